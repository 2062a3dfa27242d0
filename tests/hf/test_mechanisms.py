"""attnzoo.swap to linear and latent attention and to sparse patterns, alone and mixed, in every family."""

from __future__ import annotations

import pickle

import pytest
import torch
from transformers import DynamicCache

import attnzoo
from attnzoo import GQA, MLA, Linear
from attnzoo.hf import every
from attnzoo.hf.latent import SwappedLatentAttention
from attnzoo.hf.linear import SwappedLinearAttention
from attnzoo.hf.recurrent_cache import RecurrentLayer
from attnzoo.masks import Causal, Dilated, GlobalTokens, PerHead, RandomBlocks, SlidingWindow
from tests.hf.conftest import FAMILIES, padding

pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained")

SWAPPED = sorted(set(FAMILIES) - {"gpt_oss"})
EXACT = {"atol": 1e-12, "rtol": 1e-10}
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
LINEARS = {
    "elu": Linear(),
    "relu_mqa": Linear(1, "relu"),
    "decay": Linear(normalize=False, decay="retnet"),
    "favor": Linear(feature_map="favor"),
    "hedgehog": Linear(feature_map="hedgehog"),
    "window": Linear(feature_map="hedgehog", window=4),
}
PATTERNS = {
    "dilated": Dilated(3, 2),
    "global": SlidingWindow(3) | GlobalTokens(2),
    "random": SlidingWindow(2) | RandomBlocks(1, 2, seed=0),
    "heads": PerHead([SlidingWindow(2), SlidingWindow(5), Dilated(3, 2), Causal()]),
}


def logits(model, tokens, **inputs):
    with torch.no_grad():
        return model(tokens, **inputs).logits


def check_generation(model, tokens, caches=("dynamic", "static")):
    """Greedy tokens of a left-padded batch: those without a cache, with one, and of each row alone."""
    mask = padding((12, 7, 4), 12, "left")
    options = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    want = model.generate(tokens * mask, attention_mask=mask, use_cache=False, **options)
    for cache in caches:
        got = model.generate(tokens * mask, attention_mask=mask, cache_implementation=cache, **options)
        assert torch.equal(got, want), cache
    alone = model.generate(tokens[1:2, 5:], **options)
    assert torch.equal(alone[0, 7:], want[1, 12:])


@pytest.mark.parametrize("spec", [Linear(), MLA(), [Linear(window=3), MLA()]], ids=["linear", "mla", "mixed"])
@pytest.mark.parametrize("family", SWAPPED)
def test_every_family_generates_with_a_padded_batch_and_a_cache(build, tokens, family, spec):
    model = attnzoo.swap(build(family), spec)
    check_generation(model, tokens)
    assert not logits(model, tokens).isnan().any()


@pytest.mark.parametrize("spec", LINEARS.values(), ids=LINEARS)
def test_every_linear_attention_generates_with_a_padded_batch_and_a_cache(build, tokens, spec):
    model = attnzoo.swap(build("llama"), [spec, GQA(2)])
    check_generation(model, tokens)


@pytest.mark.parametrize("mask", PATTERNS.values(), ids=PATTERNS)
def test_sparse_patterns_generate_with_a_padded_batch_and_a_cache(build, tokens, mask):
    model = attnzoo.swap(build("llama"), [GQA(mask=mask), MLA(mask=mask)])
    i = torch.arange(12)
    want = logits(model, tokens)
    hidden = tokens.clone()
    hidden[:, 5] = 96 - hidden[:, 5]
    changed = (logits(model, hidden) - want).abs().amax(-1) > 1e-9
    assert not changed[:, :5].any() and changed[:, 5].all()
    if mask.heads is None and "random" not in str(mask).lower():
        two = mask.visible(i[:, None], i).float() @ mask.visible(i[:, None], i).float() > 0  # what two layers carry
        assert not changed[:, (two[:, 5] == 0) & (i > 5)].any()
    check_generation(model, tokens)


@pytest.mark.parametrize("spec", [Linear(), MLA(), Linear(window=3)], ids=["linear", "mla", "window"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_logit_of_a_row(build, tokens, spec, side):
    model = attnzoo.swap(build("llama", dtype=torch.float64), spec)
    mask = padding((12, 7, 4), 12, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for garbage in (0, 5):
        inputs = tokens * mask + garbage * (1 - mask)
        got = logits(model, inputs, attention_mask=mask, position_ids=positions)
        for row in range(3):
            real = mask[row].bool()
            want = logits(model, tokens[row : row + 1, real])
            torch.testing.assert_close(got[row : row + 1, real], want, **EXACT)


@pytest.mark.parametrize("spec", [Linear(), Linear(window=3), MLA()], ids=["linear", "window", "mla"])
def test_a_prompt_in_chunks_and_packed_documents_give_the_logits_of_one_pass(build, tokens, spec):
    model = attnzoo.swap(build("llama", dtype=torch.float64), spec)
    want = logits(model, tokens)
    cache = DynamicCache(config=model.config)
    parts = [logits(model, part, past_key_values=cache) for part in tokens.split([5, 1, 4, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), want, **EXACT)

    packed = torch.cat([tokens[0, :7], tokens[1, :5]])[None]
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    alone = torch.cat([logits(model, tokens[:1, :7]), logits(model, tokens[1:2, :5])], dim=1)
    cu = torch.tensor([0, 7, 12], dtype=torch.int32)
    for extra in ({"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}, {"use_cache": False}):
        torch.testing.assert_close(logits(model, packed, position_ids=positions, **extra), alone, **EXACT)


def test_a_cache_that_saw_packed_documents_is_closed(build, tokens):
    model = attnzoo.swap(build("llama"), Linear())
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    cache = model(tokens[:1], cu_seq_lens_q=cu, cu_seq_lens_k=cu).past_key_values
    with pytest.raises(ValueError, match="packed documents"):
        model(tokens[:1, :1], past_key_values=cache)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_hybrid_of_four_mechanisms_samples_and_searches_with_beams(build, tokens, family):
    specs = [Linear(window=3), MLA(), GQA(1), Linear(feature_map="relu")]
    model = attnzoo.swap(build(family, **({"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4})), specs)
    mask = padding((12, 7, 4), 12, "left")
    for options in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 5}):
        outs = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            out = model.generate(
                tokens * mask,
                attention_mask=mask,
                max_new_tokens=6,
                use_cache=use_cache,
                **({"do_sample": False} | options),
            )
            outs.append(out)
        assert torch.equal(*outs), options


def test_a_state_does_not_grow_and_latents_hold_the_rank_and_the_rope_key(build, tokens):
    model = attnzoo.swap(build("llama"), [Linear(1), MLA(kv_lora_rank=6, qk_rope_head_dim=4)])
    sizes = []
    for steps in (2, 8):
        out = model.generate(tokens, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True)
        state, latent = out.past_key_values.layers
        assert isinstance(state, RecurrentLayer) and state.get_seq_length() == 11 + steps
        assert latent.keys.shape == (3, 1, 11 + steps, 6) and latent.values.shape == (3, 1, 11 + steps, 4)
        sizes.append(sum(t.numel() for t in state.state.state) + sum(t.numel() for t in state.state.tail[:3]))
    assert sizes == [3 * 8 * 8 + 3 * 8] * 2


@pytest.mark.parametrize("spec", [Linear(feature_map="hedgehog", window=3), MLA()], ids=["linear", "mla"])
def test_assisted_decoding_gives_the_tokens_of_greedy_decoding(build, tokens, spec):
    model = attnzoo.swap(build("llama"), [spec, GQA()])
    draft = build("llama", num_hidden_layers=1)
    want = model.generate(tokens[:1], max_new_tokens=10, do_sample=False)
    got = model.generate(tokens[:1], max_new_tokens=10, do_sample=False, assistant_model=draft)
    assert torch.equal(got, want)
    swapped = attnzoo.swap(build("llama"), [Linear(), GQA()])
    assert torch.equal(model.generate(tokens[:1], max_new_tokens=10, do_sample=False, assistant_model=swapped), want)
    assert torch.equal(model.generate(tokens[:1], max_new_tokens=10, do_sample=False, prompt_lookup_num_tokens=3), want)


def test_a_state_takes_back_tokens_only_of_the_last_call_and_only_if_it_records(build, tokens):
    model = attnzoo.swap(build("llama"), Linear())
    cache = DynamicCache(config=model.config)
    logits(model, tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="activate_past_recording"):
        cache.crop(-1)
    assert cache.get_seq_length() == 12
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    want = logits(model, torch.cat([tokens[:2], tokens[:2, :1]], 1))[:, -1:]
    torch.testing.assert_close(logits(model, tokens[:2, :1], past_key_values=cache), want, **CLOSE)
    cache.reset()
    torch.testing.assert_close(logits(model, tokens, past_key_values=cache), logits(model, tokens), **CLOSE)


@pytest.mark.parametrize("family", SWAPPED)
def test_latents_at_full_rank_are_exact_where_nothing_rotates_and_finite_elsewhere(build, tokens, family):
    model = build(family, dtype=torch.float64, implementation="sdpa" if family != "gemma2" else "eager")
    want = logits(model, tokens)
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rank = min(config.hidden_size, heads * head_dim)
    attnzoo.swap(model, MLA(kv_lora_rank=rank))
    got = logits(model, tokens)
    assert got.isfinite().all()
    if family == "gpt2":
        torch.testing.assert_close(got, want, **EXACT)
        attnzoo.swap(other := build("gpt2", dtype=torch.float64), MLA(kv_lora_rank=rank, q_lora_rank=32))
        torch.testing.assert_close(logits(other, tokens), want, **EXACT)


def test_keys_at_position_zero_survive_the_cut_of_rope_where_heads_share_them(build):
    model = build("llama", dtype=torch.float64, num_key_value_heads=1)
    one = torch.tensor([[7]])
    want = logits(model, one)
    attnzoo.swap(model, MLA(kv_lora_rank=12))
    torch.testing.assert_close(logits(model, one), want, **EXACT)  # alone, a token sees its own value only


@pytest.mark.parametrize(
    "spec", [*LINEARS.values(), MLA(), MLA(q_lora_rank=8)], ids=[*LINEARS, "mla", "mla_low_rank_queries"]
)
def test_a_hybrid_trains_in_all_its_weights(build, tokens, spec):
    model = attnzoo.swap(build("llama", num_hidden_layers=4), every(2, GQA(1), spec, num_layers=4)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    layers = [layer.self_attn for layer in model.model.layers]
    kind = SwappedLatentAttention if isinstance(spec, MLA) else SwappedLinearAttention
    assert [isinstance(layer, kind) for layer in layers] == [True, False, True, False]
    assert all(p.grad.abs().sum() > 0 for n, p in layers[0].named_parameters() if not n.endswith("k_proj.bias"))


def test_linear_attention_keeps_the_weights_that_it_takes_over(build):
    model = build("llama")
    before = dict(model.named_parameters())
    attnzoo.swap(model, Linear())
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(after[name] is before[name] for name in after)


def test_a_swapped_model_swaps_back_and_latents_do_not(build, tokens):
    model = build("llama")
    want, kind = logits(model, tokens), type(model)
    attnzoo.swap(model, [Linear(), MLA()])
    with pytest.raises(ValueError, match=r"spec must be MLA\(\) for layer 1"):
        attnzoo.swap(model, GQA())
    attnzoo.swap(model, [GQA(), MLA(mask=SlidingWindow(3))])
    assert model.config.attnzoo["spec"][1]["mask"] == {"pattern": "sliding_window", "window": 3}
    other = attnzoo.swap(attnzoo.swap(build("llama"), Linear()), GQA())
    torch.testing.assert_close(logits(other, tokens), want, **CLOSE)
    assert type(other) is kind and other.config.model_type == "llama" and not hasattr(other.config, "attnzoo")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Linear(3), "must divide"),
        (MLA(kv_lora_rank=99), "kv_lora_rank must be at most 32"),
        (MLA(q_lora_rank=99), "q_lora_rank must be at most 32"),
        (MLA(qk_rope_head_dim=98), "qk_rope_head_dim must be at most 32"),
        (MLA(qk_rope_head_dim=4, rope_frequencies=[0]), "rope_frequencies must be 2 rising"),
        (MLA(v_head_dim=3), "v_head_dim must be 8"),
        ([GQA(2), MLA(v_head_dim=3)], "v_head_dim must be 8"),
        (GQA(mask=PerHead([Causal()] * 3)), "3 heads; the model has 4"),
    ],
)
def test_a_mechanism_that_does_not_fit_is_refused_and_changes_nothing(build, tokens, spec, message):
    model = build("llama")
    want, config, kind = logits(model, tokens), model.config.to_dict(), type(model)
    with pytest.raises(ValueError, match=message):
        attnzoo.swap(model, spec)
    assert model.config.to_dict() == config and type(model) is kind
    assert torch.equal(logits(model, tokens), want)


def test_a_mask_that_hides_more_than_padding_is_refused_by_linear_attention(build, tokens):
    model = attnzoo.swap(build("llama"), Linear())
    visible = torch.ones(12, 12, dtype=torch.bool).tril().expand(3, 1, 12, 12).clone()
    torch.testing.assert_close(logits(model, tokens, attention_mask=visible), logits(model, tokens), **CLOSE)
    visible[..., 3:, 1] = False
    with pytest.raises(ValueError, match="hides more than padding"):
        logits(model, tokens, attention_mask=visible)


def test_every_step_th_layer_is_the_last_of_its_group():
    assert every(3, GQA(), Linear(), num_layers=5) == [Linear(), Linear(), GQA(), Linear(), Linear()]
    with pytest.raises(ValueError, match="step"):
        every(0, GQA(), Linear(), num_layers=5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_a_hybrid_trains_in_bfloat16_and_under_autocast_with_checkpointing(build, tokens, dtype):
    specs = [Linear(feature_map="favor"), MLA(), GQA(1), Linear(feature_map="hedgehog", window=2)]
    model = attnzoo.swap(build("llama", num_hidden_layers=4, dtype=dtype or torch.float32), specs).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    mask = padding((12, 7, 4), 12, "left")
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
        model(tokens, attention_mask=mask, labels=tokens, use_cache=False).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        out = model.eval().generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert out.shape == (3, 16)


def test_a_hybrid_compiles_in_one_graph_and_survives_pickling(build, tokens):
    specs = [Linear(decay="retnet"), MLA(), GQA(1), Linear(feature_map="hedgehog", window=2)]
    model = attnzoo.swap(build("llama", num_hidden_layers=4), specs)
    want = logits(model, tokens)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), tokens), want)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, tokens, use_cache=False), want, **CLOSE)
