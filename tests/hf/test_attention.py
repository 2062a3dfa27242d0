"""attn_implementation="attnzoo" against transformers' eager attention."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    DynamicCache,
    T5Config,
    T5ForConditionalGeneration,
)

from attnzoo import masks as attnzoo_masks
from attnzoo import ops
from attnzoo.hf import attnzoo_attention
from tests.hf.conftest import FAMILIES, padding

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
DECODERS = sorted(FAMILIES)


@pytest.fixture
def calls(monkeypatch):
    """What ops.attention was called with, call by call."""
    seen = []
    real = ops.attention

    def spy(q, k, v, **options):
        seen.append({"q": q, "k": k, **options})
        return real(q, k, v, **options)

    monkeypatch.setattr(ops, "attention", spy)
    return seen


def logits(model, tokens, implementation, **inputs):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(tokens, **inputs).logits


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("family", DECODERS)
def test_logits_at_real_positions_are_eagers(build, tokens, calls, family, side):
    model = build(family)
    lengths = (12, 7, 4)
    mask = None if side is None else padding(lengths, 12, side)
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    want = logits(model, tokens, "eager", attention_mask=mask)
    got = logits(model, tokens, "attnzoo", attention_mask=mask)
    assert not got.isnan().any()
    torch.testing.assert_close(got[real], want[real], **CLOSE)
    assert len(calls) == 2
    for call in calls:
        assert call["k"].shape[1] == getattr(model.config, "num_key_value_heads", 4)
        assert isinstance(call["mask"], torch.Tensor) == (side is not None)


def test_padding_is_attended_to_when_only_the_attention_function_is_registered(build, tokens):
    AttentionInterface.register("attnzoo_without_a_mask_function", attnzoo_attention)
    model = build("llama")
    mask = padding((12, 7, 4), 12, "left")
    want = logits(model, tokens, "eager", attention_mask=mask)
    wrong = logits(model, tokens, "attnzoo_without_a_mask_function", attention_mask=mask)
    assert (wrong - want)[mask.bool()].abs().max() > 1e-2


@pytest.mark.parametrize(("cache", "beams"), [("dynamic", 1), ("dynamic", 3), ("static", 1)])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_neox"])
def test_generate_with_left_padding_gives_eagers_tokens(build, tokens, family, cache, beams):
    model = build(family)
    mask = padding((12, 7, 4), 12, "left")
    options = {
        "max_new_tokens": 8,
        "num_beams": beams,
        "do_sample": False,
        "cache_implementation": cache,
        "disable_compile": True,
    }
    inputs = tokens * mask
    want = model.generate(inputs, attention_mask=mask, **options)
    model.set_attn_implementation("attnzoo")
    got = model.generate(inputs, attention_mask=mask, **options)
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "phi3"])
def test_a_prompt_in_chunks_gives_the_logits_of_one_pass_without_a_mask_tensor(build, tokens, calls, family):
    model = build(family)
    want = logits(model, tokens, "eager")
    model.set_attn_implementation("attnzoo")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in tokens.split([5, 1, 4, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), want, **CLOSE)
    assert not any(isinstance(call["mask"], torch.Tensor) for call in calls)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_the_prefill_of_a_static_cache_makes_no_mask_tensor(build, tokens, calls, family):
    model = build(family, implementation="attnzoo")
    model.generate(tokens, max_new_tokens=1, do_sample=False, cache_implementation="static", disable_compile=True)
    assert len(calls) == 2
    assert not any(isinstance(call["mask"], torch.Tensor) for call in calls)
    assert all(call["k"].shape[2] == 12 for call in calls)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "gpt_oss"])
def test_packed_documents_give_each_ones_own_logits_without_a_mask_tensor(build, calls, family, use_cache):
    model = build(family)
    documents = [torch.randint(2, 97, (1, n), generator=torch.Generator().manual_seed(n)) for n in (7, 1, 11, 3)]
    want = torch.cat([logits(model, document, "eager") for document in documents], dim=1)
    packed = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    cu = torch.tensor([0, 7, 8, 19, 22], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 11, "max_length_k": 11}
    got = logits(model, packed, "attnzoo", position_ids=positions, use_cache=use_cache, **lengths)
    torch.testing.assert_close(got, want, **CLOSE)
    # transformers looks for documents in position_ids when there is no cache; its gpt_oss does not
    if not use_cache and family != "gpt_oss":
        torch.testing.assert_close(
            logits(model, packed, "attnzoo", position_ids=positions, use_cache=False), want, **CLOSE
        )
        torch.testing.assert_close(
            logits(model, packed.repeat(2, 1), "attnzoo", position_ids=positions.repeat(2, 1), use_cache=False)[1:],
            want,
            **CLOSE,
        )
    assert not any(isinstance(call["mask"], torch.Tensor) for call in calls)


def test_packed_documents_with_a_padding_mask_are_refused(build, tokens):
    model = build("llama")
    cu = torch.tensor([0, 12], dtype=torch.int32)
    with pytest.raises(ValueError, match="attention_mask"):
        logits(
            model, tokens[:1], "attnzoo", attention_mask=padding((7,), 12, "left"), cu_seq_lens_q=cu, cu_seq_lens_k=cu
        )


@pytest.mark.parametrize("side", [None, "right"])
def test_an_encoder_with_padding_gives_eagers_states(tokens, calls, side):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    model = BertModel(config).eval()
    mask = None if side is None else padding((12, 7, 4), 12, side)
    states = []
    for implementation in ("eager", "attnzoo"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            states.append(model(tokens, attention_mask=mask).last_hidden_state)
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(states[1][real], states[0][real], **CLOSE)
    for call in calls:  # the padding mask is a view, the same for every query
        assert not isinstance(call["mask"], torch.Tensor) or call["mask"].stride(2) == 0


def test_cross_attention_of_an_encoder_decoder_gives_eagers_logits_and_tokens(tokens):
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    widths = {
        "d_model": 32,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "vocab_size": 97,
        "max_position_embeddings": 64,
    }
    model = BartForConditionalGeneration(BartConfig(**sizes, **widths)).eval()
    mask = padding((12, 7, 4), 12, "right")
    inputs = {"attention_mask": mask, "decoder_input_ids": tokens[:, :5]}
    want, want_tokens = (
        logits(model, tokens, "eager", **inputs),
        model.generate(tokens, attention_mask=mask, max_length=9),
    )
    got = logits(model, tokens, "attnzoo", **inputs)
    torch.testing.assert_close(got, want, **CLOSE)
    assert torch.equal(model.generate(tokens, attention_mask=mask, max_length=9), want_tokens)


def test_a_position_bias_is_refused_not_ignored(tokens):
    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    config._attn_implementation = "attnzoo"
    model = T5ForConditionalGeneration(config).eval()
    with pytest.raises(ValueError, match=r"position_bias|does not reach"):  # older T5s know no interface
        model(tokens, decoder_input_ids=tokens)
    q = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="position_bias"):
        attnzoo_attention(torch.nn.Module(), q, q, q, None, position_bias=torch.zeros(1, 2, 3, 3))


@pytest.mark.parametrize("family", ["bloom", "codegen"])
def test_a_model_whose_layers_do_not_ask_for_the_attention_function_is_refused(tokens, family):
    sizes = {"n_layer": 1, "n_head": 4, "vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2}
    sizes |= {"hidden_size": 32} if family == "bloom" else {"n_embd": 32, "rotary_dim": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), attn_implementation="attnzoo")
    with pytest.raises(ValueError, match=f"does not reach the attention layers of {family}"):
        model(tokens)


def test_a_callers_own_mask_counts_and_a_bias_in_its_place_is_refused(build, tokens):
    model = build("llama")
    visible = torch.ones(12, 12, dtype=torch.bool).tril().expand(3, 1, 12, 12).clone()
    visible[..., 3:, 1] = False
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    want = logits(model, tokens, "eager", attention_mask=additive)
    torch.testing.assert_close(logits(model, tokens, "attnzoo", attention_mask=visible), want, **CLOSE)
    torch.testing.assert_close(logits(model, tokens, "attnzoo", attention_mask=additive), want, **CLOSE)
    with pytest.raises(ValueError, match="biases"):
        logits(model, tokens, "attnzoo", attention_mask=torch.full_like(additive, -0.5))
    with pytest.raises(ValueError, match="attention_mask"):
        logits(model, tokens, "attnzoo", attention_mask=visible.long())


def test_dropout_counts_in_training_only(build, tokens, calls):
    model = build("llama", attention_dropout=0.25, implementation="attnzoo")
    model.eval()(tokens)
    model.train()(tokens)
    assert [call["dropout_p"] for call in calls] == [0.0, 0.0, 0.25, 0.25]


def test_is_causal_follows_the_module_and_the_argument_follows_over_it(build, tokens):
    layer = torch.nn.Module()
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    v = v[..., :3]
    causal, full = ops.attention(q, k, v, mask=attnzoo_masks.Causal()), ops.attention(q, k, v)
    for is_causal, argument, want in [
        (True, None, causal),
        (False, None, full),
        (True, False, full),
        (False, True, causal),
    ]:
        layer.is_causal = is_causal
        out, weights = attnzoo_attention(layer, q, k, v, None, is_causal=argument)
        assert weights is None
        torch.testing.assert_close(out, want.transpose(1, 2))


def test_gradient_checkpointing_gives_eagers_gradients(build, tokens):
    grads = []
    for implementation in ("eager", "attnzoo"):
        model = build("gemma2", implementation=implementation).train()
        if implementation == "attnzoo":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        positions = torch.arange(12)[None].expand(3, -1) % 7
        model(tokens, labels=tokens, position_ids=positions, use_cache=False).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, want in grads[0].items():
        torch.testing.assert_close(grads[1][name], want, atol=1e-5, rtol=1e-3)
