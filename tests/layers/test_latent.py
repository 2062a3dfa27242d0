"""Latent attention without a cache: its two forms against each other and paper and pencil, and what it refuses."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import attnzoo
from attnzoo.caches import ContiguousCache, LatentCache
from attnzoo.layers import MultiHeadLatentAttention, RotaryEmbedding
from attnzoo.layers.latent_inputs import absorbed_costs_less
from attnzoo.masks import Causal, Full, PerHead, SlidingWindow
from attnzoo.specs import MLA, spec_from_dict
from tests.layers.latent import DIM, FORMS, HEADS, NOPE, RANK, ROPE, VALUE, close, make, new_cache, tokens
from tests.layers.naive import naive_norm, rotate


def naive(layer: MultiHeadLatentAttention, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """What `layer` gives for one sequence `x [S, dim]`, head by head, as the paper's equations 37 to 47 say."""

    def linear(projection: torch.nn.Linear, x: Tensor) -> Tensor:
        return x @ projection.weight.T + (0 if projection.bias is None else projection.bias)

    def norm(module: torch.nn.Module, x: Tensor) -> Tensor:
        return naive_norm(x, module.weight) if isinstance(module, torch.nn.RMSNorm) else x

    def turn(x: Tensor) -> Tensor:
        rope = layer.rope
        return x if rope is None else rotate(x, at, rope.base, rope.rotary_dim, rope.layout)

    at = torch.arange(len(x)) if positions is None else positions
    if layer.q_lora_rank is None:
        q = linear(layer.q_proj, x)
    else:
        q = linear(layer.q_b_proj, norm(layer.q_a_layernorm, linear(layer.q_a_proj, x)))
    low = linear(layer.kv_a_proj_with_mqa, x)
    kv, rope_key = linear(layer.kv_b_proj, norm(layer.kv_a_layernorm, low[:, :RANK])), turn(low[:, RANK:])
    i, j = torch.arange(len(x))[:, None], torch.arange(len(x))[None, :]
    heads = []
    for h, (q_h, kv_h) in enumerate(zip(q.chunk(HEADS, -1), kv.chunk(HEADS, -1), strict=True)):
        scores = (q_h[:, :NOPE] @ kv_h[:, :NOPE].T + turn(q_h[:, NOPE:]) @ rope_key.T) * layer.scale
        if layer.mask is not None:
            scores = scores.masked_fill(~layer.mask.head(h).visible(i, j), -torch.inf)
        heads.append(torch.softmax(scores, -1) @ kv_h[:, NOPE:])
    return linear(layer.o_proj, torch.cat(heads, -1))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"q_lora_rank": None, "rope": None, "mask": None},
    {"bias": True, "rope": RotaryEmbedding(ROPE, base=100.0), "mask": SlidingWindow(3)},
    {"bias": True, "q_lora_rank": None, "norm": False, "mask": Full()},
    {"mask": PerHead((SlidingWindow(2), Causal(), SlidingWindow(4)))},
    {"norm": False, "scale": 0.3, "mask": SlidingWindow(1) | SlidingWindow(5) & Causal()},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_both_forms_are_the_paper(options: dict[str, Any]) -> None:
    layer, x = make(**options), tokens(2, 7)
    expected = torch.stack([naive(layer, row) for row in x])
    for form in FORMS:
        close(layer(x, form=form), expected)
    places = torch.randint(0, 50, (2, 7))
    expected = torch.stack([naive(layer, row, at) for row, at in zip(x, places, strict=True)])
    for form in FORMS:
        close(layer(x, positions=places, form=form), expected)


def test_both_forms_have_the_same_gradients() -> None:
    layer, x = make(bias=True), tokens(2, 6)
    weights = torch.randn_like(x)
    found = []
    for form in ("materialised", "absorbed"):
        inputs = [x.clone().requires_grad_(), *layer.parameters()]
        found.append(torch.autograd.grad((layer(inputs[0], form=form) * weights).sum(), inputs))
    for one, other in zip(*found, strict=True):
        close(one, other)


def test_sizes_and_names_are_those_of_deepseek() -> None:
    state = {name: list(value.shape) for name, value in make(bias=True).state_dict().items()}
    assert state == {
        "q_a_proj.weight": [8, DIM],
        "q_a_proj.bias": [8],
        "q_a_layernorm.weight": [8],
        "q_b_proj.weight": [HEADS * (NOPE + ROPE), 8],
        "kv_a_proj_with_mqa.weight": [RANK + ROPE, DIM],
        "kv_a_proj_with_mqa.bias": [RANK + ROPE],
        "kv_a_layernorm.weight": [RANK],
        "kv_b_proj.weight": [HEADS * (NOPE + VALUE), RANK],
        "o_proj.weight": [DIM, HEADS * VALUE],
        "o_proj.bias": [DIM],
    }
    assert set(make(q_lora_rank=None, norm=False).state_dict()) == {
        "q_proj.weight",
        "kv_a_proj_with_mqa.weight",
        "kv_b_proj.weight",
        "o_proj.weight",
    }
    assert attnzoo.MultiHeadLatentAttention is MultiHeadLatentAttention and attnzoo.MLA is MLA


@pytest.mark.parametrize("form", ["materialised", "absorbed"])
def test_padding_and_packing_are_a_loop_whatever_stands_in_between(form: Any) -> None:
    layer, x, lengths, bounds = make(bias=True), tokens(3, 6), [6, 2, 0], [0, 4, 4, 5, 9]
    for row, length in enumerate(lengths):
        x[row, length:] = torch.nan
    packed = tokens(1, 11)
    packed[:, 9:] = torch.nan

    def rows(x: Tensor) -> tuple[Tensor, Tensor]:
        out = layer(x, key_lengths=torch.tensor(lengths), form=form)
        assert out.isfinite().all()
        alone = [layer(x[row : row + 1, :length])[0] for row, length in enumerate(lengths) if length]
        return torch.cat([out[row, :length] for row, length in enumerate(lengths)]), torch.cat(alone)

    def documents(x: Tensor) -> tuple[Tensor, Tensor]:
        out = layer(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), form=form)
        assert out.isfinite().all()
        return out[:, :9], torch.cat([layer(x[:, a:b]) for a, b in pairwise(bounds) if b > a], dim=1)

    for run, given_x in ((rows, x), (documents, packed)):
        inputs = [given_x.clone().requires_grad_(), *layer.parameters()]
        together, loop = run(inputs[0])
        close(together, loop)
        weights = torch.randn_like(loop)
        for mine, other in zip(
            *(torch.autograd.grad((out * weights).sum(), inputs) for out in (together, loop)), strict=True
        ):
            close(mine, other)


@pytest.mark.parametrize("sizes", [(512, 128, 128), (10, 6, 5), (16, 64, 64), (64, 8, 8)])
def test_the_form_is_the_one_with_fewer_multiplications(sizes: tuple[int, int, int]) -> None:
    rank, nope, value = sizes
    rope = 4
    for new, total in ((1, 2), (1, 9000), (4, 64), (100, 4096), (170, 10**6), (171, 10**6), (600, 700), (5, 5)):
        materialised = total * rank * (nope + value) + new * total * (nope + rope + value)
        absorbed = new * rank * (nope + value) + new * total * (rank + rope + rank)
        assert absorbed_costs_less(new, total, *sizes) == (absorbed <= materialised)
    assert absorbed_costs_less(1, 9000, 512, 128, 128) and not absorbed_costs_less(600, 1200, 512, 128, 128)


def test_autocast_runs_in_its_dtype() -> None:
    layer, x = make(bias=True).float(), tokens(2, 5).float()
    cache = new_cache(2, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = torch.cat([layer(x[:, :4], cache=cache), layer(x[:, 4:], cache=cache, form="absorbed")], dim=1)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), rtol=0, atol=0.03)


@pytest.mark.parametrize("form", ["materialised", "absorbed"])
def test_gradients_are_right_in_fp64(form: Any) -> None:
    layer, lengths = make(bias=True), torch.tensor([4, 3])
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        options = {"key_lengths": lengths, "form": form}
        out = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,), options)
        return out * (torch.arange(4) < lengths[:, None])[..., None]

    inputs = [tokens(2, 4).requires_grad_(), *(p.detach().clone().requires_grad_() for p in layer.parameters())]
    torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_dropout_acts_in_training_only_and_not_with_a_cache() -> None:
    layer, x = make(dropout=0.4), tokens(1, 4)
    plain = make()(x)
    close(layer.eval()(x), plain)
    close(layer(x, cache=new_cache(1)), plain)
    layer.train()
    for form in FORMS:
        draws = layer(x.expand(2000, -1, -1), form=form)
        assert not torch.allclose(draws[0], draws[1])
        torch.testing.assert_close(draws.mean(0, keepdim=True), plain, rtol=0, atol=0.03)
    cache = LatentCache(1, 4, RANK, ROPE, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"cache with dropout 0\.4 in training"):
        layer(x, cache=cache)
    assert cache.length == 0


@pytest.mark.parametrize(
    ("kind", "form"), [("plain", "materialised"), ("plain", "absorbed"), ("padded", "auto"), ("packed", "absorbed")]
)
def test_the_layer_compiles_into_one_graph(kind: str, form: Any) -> None:
    layer, x = make(bias=True), tokens(1, 8)
    inputs: dict[str, Any] = {
        "plain": {},
        "padded": {"key_lengths": torch.tensor([5])},
        "packed": {"cu_seqlens": torch.tensor([0, 3, 7], dtype=torch.int32)},
    }[kind]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = compiled(ours, **inputs, form=form), layer(theirs, **inputs, form=form)
    close(out, expected)
    close(*(torch.autograd.grad(y.pow(2).sum(), given)[0] for y, given in ((out, ours), (expected, theirs))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_rope_head_dim": 3, "rope": None}, "qk_rope_head_dim is 3; it must be even"),
        ({"qk_rope_head_dim": 0, "rope": None}, "qk_rope_head_dim is 0; it must be at least 1"),
        ({"kv_lora_rank": 0}, "kv_lora_rank is 0"),
        ({"q_lora_rank": 0}, "q_lora_rank is 0"),
        ({"v_head_dim": -1}, "v_head_dim is -1"),
        ({"rope": RotaryEmbedding(8)}, "rope has head_dim 8; the layer's qk_rope_head_dim is 4"),
        ({"mask": "causal"}, "mask is a str"),
        ({"mask": PerHead((Causal(), SlidingWindow(2)))}, "mask is made for 2 heads; num_heads is 3"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_layers_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": torch.ones(2, 3, DIM + 1)}, r"x has shape \[2, 3, 21\]"),
        ({"form": "fused"}, "form is 'fused'; allowed are 'auto', 'materialised', 'absorbed'"),
        ({"context": torch.ones(2, 3, DIM)}, "context given; latent attention has no cross-attention"),
        ({"cache": LatentCache(3, 8, RANK, ROPE)}, "cache is made for batch 3, .* here are batch 2"),
        ({"cache": LatentCache(2, 8, RANK + 1, ROPE)}, "1 heads of 11"),
        ({"cache": LatentCache(2, 8, RANK, ROPE + 2)}, "and 6"),
        ({"cache": ContiguousCache(2, 2, 8, RANK, ROPE)}, "2 heads of 10"),
        ({"cache": LatentCache(2, 8, RANK, ROPE, dtype=torch.float64)}, "this cache is torch.float64"),
        ({"cache": LatentCache(2, 2, RANK, ROPE)}, "cache full"),
        (
            {"x": torch.ones(1, 3, DIM), "cache": LatentCache(1, 8, RANK, ROPE), "cu_seqlens": torch.tensor([0, 3])},
            "cache given with cu_seqlens",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named_and_leave_the_cache_alone(inputs: dict[str, Any], message: str) -> None:
    layer = make().float()
    with pytest.raises(ValueError, match=message):
        layer(**{"x": torch.ones(2, 3, DIM), **inputs})
    assert "cache" not in inputs or inputs["cache"].length == 0


def test_the_spec_survives_yaml_and_refuses_bad_sizes() -> None:
    for spec in (MLA(), MLA(512, 128, 64, 128, 1536, SlidingWindow(4) & Causal())):
        assert spec_from_dict(yaml.safe_load(yaml.safe_dump(spec.to_dict()))) == spec
    for options, message in (
        ({"kv_lora_rank": 0}, "kv_lora_rank must be a positive integer or None, got 0"),
        ({"v_head_dim": 1.5}, "v_head_dim must be"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim must be even, got 7"),
        ({"mask": "causal"}, "mask must be one of attnzoo.masks"),
    ):
        with pytest.raises(ValueError, match=message):
            MLA(**options)
