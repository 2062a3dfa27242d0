"""The methods that read calibration text: exact where they can be, and better than the mean where not."""

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from attnzoo import GQA
from attnzoo.conversion import ConversionError
from attnzoo.conversion.damage import Damage
from attnzoo.conversion.families import Projections, family_for
from attnzoo.hf import calibration_convert, convert
from tests.conversion.models import logits, tiny

CLOSED = ["svd", "aligned"]
# family -> what its config says, and heads after; none means the smallest
FAMILIES = {
    "llama": ({}, 2),
    "qwen2": ({}, 1),  # biases
    "qwen3": ({}, 2),  # norms of heads
    "gemma3_text": ({}, 1),  # norms whose weights are 1 + w, and two bases of RoPE
    "phi": ({}, 2),  # partial rotary
    "gpt_neox": ({"use_parallel_residual": True}, 2),  # partial rotary, and norms that move into other weights
    "gpt2": ({}, 1),  # no RoPE
    "cohere": ({"use_qk_norm": True}, 1),  # interleaved RoPE, norms that subtract a mean
    "smollm3": ({}, 1),  # layers without RoPE
    "gptj": ({}, 1),  # interleaved partial rotary, attention of its own
}


def alike(model_type: str, heads: int, **changes: object) -> PreTrainedModel:
    """A model whose KV heads are, group by group, one head that each query head and o see through a map of its own.

    The maps are what the family lets through: complex factors in planes under RoPE, matrices elsewhere, signs behind
    norms (which subtract no mean).
    """
    model = tiny(model_type, **changes)
    family = family_for(model_type)
    config = model.config.to_dict()
    geometry = family.geometry(config)
    state, generator = model.state_dict(), torch.Generator().manual_seed(5)
    for layer in range(geometry.num_layers):
        stem = family.attention_path(layer) + "."
        inner = {n.removeprefix(stem): t for n, t in state.items() if n.startswith(stem)}
        kept = {n: t for n, t in inner.items() if n in (*family.required, *family.optional)}
        p = family.split(kept, geometry)
        p = _mapped(p, heads, family.rotary(config, layer), centred=family.centred_norm, generator=generator)
        state |= {stem + name: tensor for name, tensor in family.join(p, geometry).items()}
    model.load_state_dict(state)
    return model


def _mapped(p: Projections, heads: int, rotary, *, centred: bool, generator: torch.Generator) -> Projections:
    n, d = p.k.shape[0] // heads, p.k.shape[1]
    first, second = rotary.planes()
    free = rotary.free(d)

    def maps() -> tuple[torch.Tensor, torch.Tensor]:
        key = torch.zeros(d, d)
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            x, y = torch.randn(2, generator=generator).tolist()
            if p.k_norm is not None:
                x, y = (1.0 if x > 0 or centred else -1.0), 0.0
            key[a, a], key[a, b], key[b, a], key[b, b] = x, -y, y, x
        some = torch.randn(len(free), len(free), generator=generator)
        if p.k_norm is not None:
            some = torch.diag(some.diagonal().sign()) if not centred else torch.eye(len(free))
        key[free[:, None], free] = some
        return key, torch.randn(d, d, generator=generator)

    new = {name: getattr(p, name) for name in ("k", "v", "k_bias", "v_bias")}
    pairs = [maps() for _ in range(p.k.shape[0])]
    for index, part in enumerate("kv"):
        for name in (part, f"{part}_bias"):
            if new[name] is not None:
                chosen = new[name][::n].repeat_interleave(n, dim=0)
                new[name] = torch.stack([pair[index] @ head for pair, head in zip(pairs, chosen, strict=True)])
    if p.k_norm is not None and p.k_norm.ndim == 2:
        new["k_norm"] = p.k_norm[::n].repeat_interleave(n, dim=0)
    return replace(p, **new)


def ids(rows: int = 8, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 67, (rows, 24), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_heads_that_are_alike_up_to_what_passes_are_recovered_exactly(model_type):
    changes, heads = FAMILIES[model_type]
    model = alike(model_type, heads, **changes)
    new = convert(model, GQA(heads), method="svd", calibration=ids())
    assert new.config.to_dict() != model.config.to_dict()
    scale = logits(model).abs().max()
    assert (logits(new) - logits(model)).abs().max() < 2e-5 * scale
    mean = convert(model, GQA(heads), method="mean")
    if model_type != "cohere":  # where nothing passes but what the mean takes too
        assert (logits(mean) - logits(model)).abs().max() > 1e-2 * scale


@pytest.mark.parametrize("method", ["svd", "aligned", "refit", "regress"])
def test_every_method_keeps_duplicated_heads(method):
    model = tiny("llama")
    state = model.state_dict()
    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name:
            heads = tensor.unflatten(0, (6, -1))
            heads[1::2] = heads[::2]
    new = convert(model, GQA(3), method=method, calibration=ids(), steps=3)
    # A step of Adam has a size of its own, however small the gradient.
    assert (logits(new) - logits(model)).abs().max() < (0.2 if method == "regress" else 1e-4)


@pytest.mark.parametrize("method", ["svd", "aligned", "refit", "regress"])
def test_the_number_of_heads_that_is_there_changes_no_bit(method):
    model = tiny("qwen2")
    new = convert(model, GQA(6), method=method, calibration=ids())
    for name, tensor in model.state_dict().items():
        assert torch.equal(new.state_dict()[name], tensor), name


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_each_method_does_less_damage_than_the_one_before_it(model_type):
    model, seen = tiny(model_type), {}
    for method in ("mean", "svd", "refit", "regress"):
        text = None if method == "mean" else ids(64)
        convert(
            model,
            GQA(1),
            method=method,
            calibration=text,
            held_out=ids(16, seed=9),
            steps=40,
            report=seen.setdefault(method, []).append,
        )
    errors = {method: found[0].layers[0].attention_error for method, found in seen.items()}
    assert errors["svd"] < errors["mean"], errors
    assert errors["refit"] < errors["svd"], errors
    assert errors["regress"] < errors["svd"], errors


def test_the_damage_is_what_the_two_models_say_of_the_text():
    model, found = tiny("llama"), []
    text = ids(4, seed=9)
    new = convert(model, GQA(2), method="svd", calibration=ids(), held_out=text, report=found.append)
    damage: Damage = found[0]
    with torch.no_grad():
        old, now = (m(text).logits[:, :-1].double().log_softmax(-1).flatten(0, 1) for m in (model, new))
    following = text[:, 1:].flatten()
    assert damage.tokens == len(following) and damage.held_out
    assert damage.cross_entropy_before == pytest.approx(-old[range(len(old)), following].mean().item(), rel=1e-5)
    assert damage.cross_entropy == pytest.approx(-now[range(len(now)), following].mean().item(), rel=1e-5)
    assert damage.kl == pytest.approx((old.exp() * (old - now)).sum(-1).mean().item(), rel=1e-4)
    assert (damage.kv_bytes_before, damage.kv_bytes) == (2 * 2 * 6 * 10 * 4, 2 * 2 * 2 * 10 * 4)
    assert len(damage.layers) == 2 and damage.to_dict()["perplexity"] == damage.perplexity


def test_grouping_by_similarity_finds_heads_that_are_not_neighbours():
    model = tiny("llama")
    state = model.state_dict()
    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name:
            heads = tensor.unflatten(0, (6, -1))
            heads[3:] = heads[[1, 2, 0]]
    apart = convert(model, GQA(3), method="svd", calibration=ids())
    together = convert(model, GQA(3), method="svd", calibration=ids(), grouping="similarity")
    assert (logits(together) - logits(model)).abs().max() < 1e-4
    assert (logits(apart) - logits(model)).abs().max() > 1e-2


def test_auto_is_svd_with_text_and_mean_without():
    model = tiny("llama")
    assert convert(model, GQA(2)).config.attnzoo["method"] == "mean"
    record = convert(model, GQA(2), calibration=ids()).config.attnzoo
    assert (record["method"], record["calibration_tokens"]) == ("svd", 8 * 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "svd"}, "'svd' needs calibration text and got none"),
        ({"method": "regress"}, "'regress' needs calibration text"),
        ({"method": "median"}, "method must be one of mean, first, random, svd, aligned, refit, regress"),
        ({"grouping": "similarity"}, "needs calibration text"),
        ({"grouping": "size", "calibration": ids()}, "'order' or 'similarity'"),
        ({"calibration": ids() + 60}, "token ids must be from 0 to 67"),
        ({"calibration": ["some text"]}, "token ids"),
        ({"calibration": torch.zeros(3)}, "token ids"),
    ],
)
def test_what_a_method_lacks_is_named(changes, message):
    with pytest.raises(ConversionError, match=message):
        convert(tiny("llama"), GQA(2), **changes)


@pytest.mark.parametrize("method", ["svd", "refit", "regress"])
def test_layers_may_compute_in_half_precision_as_they_do_on_a_gpu(method, monkeypatch):
    monkeypatch.setattr(calibration_convert, "computing", lambda stored, device: torch.bfloat16)
    model, found = tiny("qwen2", dtype=torch.bfloat16), []
    new = convert(model, GQA(1), method=method, calibration=ids(32), steps=20, report=found.append)
    monkeypatch.undo()
    exact = convert(tiny("qwen2"), GQA(1), method="mean", held_out=ids(32), report=found.append)
    assert new.dtype == torch.bfloat16 and exact.dtype == torch.float32
    assert found[0].layers[0].attention_error < found[1].layers[0].attention_error


def test_the_model_that_was_converted_stays_as_it_was():
    model = tiny("llama")
    before = logits(model)
    convert(model, GQA(1), method="regress", calibration=ids(), steps=2)
    assert torch.equal(logits(model), before)
