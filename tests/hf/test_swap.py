"""attnzoo.swap against the stock models."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config, T5Model

import attnzoo
import attnzoo.conversion.families
from attnzoo import GQA
from attnzoo.hf.layers import SwappedAttention
from attnzoo.masks import Causal, Full, SlidingWindow
from tests.hf.conftest import FAMILIES, padding

SWAPPED = sorted(set(FAMILIES) - {"gpt_oss"})
WITH_KV_HEADS = sorted(set(SWAPPED) - {"gpt2", "gpt_neox"})
EXACT = {"atol": 1e-12, "rtol": 1e-12}
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def logits(model, tokens, **inputs):
    with torch.no_grad():
        return model(tokens, **inputs).logits


def layers(model):
    return [module for module in model.modules() if isinstance(module, SwappedAttention)]


def repeated_heads(model):
    """Give all KV heads the weights of the first of their pair, so that a merge to two heads loses nothing."""
    config = model.config.to_dict()
    family = attnzoo.conversion.families.family_for(config["model_type"])
    geometry = family.geometry(config)
    for number in range(geometry.num_layers):
        layer = model.get_submodule(family.attention_path(number))
        state = layer.state_dict()
        parts = family.split(state, geometry)
        for tensor in (parts.k, parts.v, parts.k_bias, parts.v_bias):
            if tensor is not None:
                tensor.copy_(tensor[::2].repeat_interleave(2, 0))
        layer.load_state_dict(state | family.join(parts, geometry))
    return model


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("family", SWAPPED)
def test_the_number_of_heads_that_is_there_changes_no_logit_and_no_name(build, tokens, family, side):
    # transformers' eager softmax is fp32 at best, its sdpa has no softcap
    softcap = family == "gemma2"
    model = build(
        family, dtype=torch.float32 if softcap else torch.float64, implementation="eager" if softcap else "sdpa"
    )
    mask = None if side is None else padding((12, 7, 4), 12, side)
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    want, names = logits(model, tokens, attention_mask=mask), set(model.state_dict())
    same = attnzoo.swap(model, GQA())
    assert same is model and len(layers(model)) == 2
    got = logits(model, tokens, attention_mask=mask)
    torch.testing.assert_close(got[real], want[real], **(CLOSE if softcap else EXACT))
    assert not got.isnan().any()
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("family", sorted(set(SWAPPED) - {"qwen3"}))
def test_heads_that_were_duplicated_merge_without_a_change(build, tokens, family):
    model = attnzoo.swap(repeated_heads(build(family, dtype=torch.float64)), GQA())
    want = logits(model, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if family in ("gpt2", "gpt_neox") else "error")
        attnzoo.swap(model, GQA(num_kv_heads=2))
    torch.testing.assert_close(logits(model, tokens), want, **EXACT)
    assert [layer.num_kv_heads for layer in layers(model)] == [2, 2]


@pytest.mark.parametrize("family", WITH_KV_HEADS)
def test_a_swapped_model_is_saved_as_a_stock_checkpoint_with_equal_logits(build, tokens, tmp_path, family):
    model = attnzoo.swap(build(family), GQA(num_kv_heads=1))
    want = logits(model, tokens)
    model.save_pretrained(tmp_path)
    stock, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    assert type(stock) is type(model) and not layers(stock)
    assert stock.config.num_key_value_heads == 1
    torch.testing.assert_close(logits(stock, tokens), want, **CLOSE)
    fresh = attnzoo.swap(build(family), GQA(num_kv_heads=1))
    fresh.load_state_dict(stock.state_dict())
    assert torch.equal(logits(fresh, tokens), want)


@pytest.mark.filterwarnings("ignore:save_pretrained")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", SWAPPED)
def test_generation_with_a_cache_of_fewer_heads_gives_the_tokens_of_no_cache(build, tokens, family, cache):
    model = attnzoo.swap(build(family), GQA(num_kv_heads=1))
    mask = padding((12, 7, 4), 12, "left")
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    want = model.generate(tokens * mask, use_cache=False, **options)
    got = model.generate(
        tokens * mask, cache_implementation=cache, disable_compile=True, return_dict_in_generate=True, **options
    )
    assert torch.equal(got.sequences, want)
    assert {layer.keys.shape[1] for layer in got.past_key_values.layers} == {1}


@pytest.mark.parametrize("family", ["mistral", "phi3", "qwen2", "gemma2"])
def test_a_window_for_all_layers_goes_into_the_stock_config(build, tokens, tmp_path, family):
    model = attnzoo.swap(build(family), GQA(mask=SlidingWindow(3)))
    want = logits(model, tokens)
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(logits(stock, tokens), want, **CLOSE)
    other = attnzoo.swap(build(family), GQA(mask=Causal()))
    assert (logits(other, tokens) - want).abs().max() > 1e-3


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral", "gpt_neox"])
def test_masks_that_no_stock_config_holds_work_in_memory_with_padding_and_caches(build, tokens, family, cache):
    model = build(family)
    specs = [GQA(mask=SlidingWindow(4)), GQA(mask=Full())]
    with pytest.warns(UserWarning, match="save_pretrained"):
        attnzoo.swap(model, specs)
    mask = padding((12, 7, 4), 12, "left")
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    want = model.generate(tokens * mask, use_cache=False, **options)
    got = model.generate(tokens * mask, cache_implementation=cache, disable_compile=True, **options)
    assert torch.equal(got, want)
    alone = model.generate(tokens[1:2, 5:], max_new_tokens=6, do_sample=False)
    assert torch.equal(alone[0, 7:], want[1, 12:])
    assert [layer.mask for layer in layers(model)] == [SlidingWindow(4), Causal()]
    assert model.config.attnzoo["spec"][0]["mask"] == {"pattern": "sliding_window", "window": 4}


def test_a_layers_own_window_is_computed_as_the_stock_class_computes_it(build, tokens):
    model, stock = build("llama"), build("mistral", sliding_window=4)
    with pytest.warns(UserWarning):
        attnzoo.swap(model, GQA(mask=SlidingWindow(4)))
    state = {name: tensor for name, tensor in model.state_dict().items() if "self_attn" not in name or "weight" in name}
    stock.load_state_dict(state)
    for layer in layers(model):
        for linear in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
            linear.bias = None
    torch.testing.assert_close(logits(model, tokens), logits(stock, tokens), **CLOSE)


def test_swapping_twice_is_swapping_once_and_masks_can_be_taken_back(build, tokens):
    once = attnzoo.swap(build("mistral"), GQA(num_kv_heads=1))
    twice = attnzoo.swap(attnzoo.swap(build("mistral"), GQA(num_kv_heads=2)), GQA(num_kv_heads=1))
    torch.testing.assert_close(logits(twice, tokens), logits(once, tokens), **CLOSE)
    with pytest.warns(UserWarning):
        attnzoo.swap(twice, [GQA(mask=SlidingWindow(2)), GQA()])
    attnzoo.swap(twice, GQA(mask=SlidingWindow(5)))
    torch.testing.assert_close(logits(twice, tokens), logits(once, tokens), **CLOSE)
    assert twice.config.sliding_window == 5 and not hasattr(twice.config, "attnzoo")


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_dtype_mode_and_requires_grad_are_kept(build, family):
    model = build(family, dtype=torch.bfloat16).train()
    frozen = "qkv_proj" if family == "phi3" else "c_attn"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attnzoo.swap(model, GQA(num_kv_heads=2))
    for layer in layers(model):
        assert layer.training and all(module.training for module in layer.modules())
        for name, parameter in layer.named_parameters():
            assert parameter.dtype == torch.bfloat16
            assert parameter.requires_grad == name.startswith("o_proj")


def test_untouched_weights_are_the_same_parameters(build):
    model = build("llama")
    before = dict(model.named_parameters())
    attnzoo.swap(model, GQA(num_kv_heads=2))
    after = dict(model.named_parameters())
    changed = {name.split(".")[-2] for name in after if after[name] is not before[name]}
    assert changed == {"k_proj", "v_proj"}


def test_a_swapped_model_trains_with_checkpointing_as_the_stock_one_does(build, tokens):
    grads = []
    for swapped in (False, True):
        model = build("gemma2").train()
        if swapped:
            attnzoo.swap(model, GQA())
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, want in grads[0].items():
        torch.testing.assert_close(grads[1][name], want, atol=1e-5, rtol=1e-3)


def test_dropout_behind_the_output_is_kept(build, tokens):
    model = build("starcoder2", residual_dropout=0.5)
    attnzoo.swap(model, GQA(num_kv_heads=2))
    x = torch.randn(1, 3, 32)
    layer = layers(model)[0]
    with torch.no_grad():
        kept = layer.train()(x)[0] != 0
        assert 0 < kept.sum() < kept.numel() and (layer.eval()(x)[0] != 0).all()


def test_packed_documents_in_a_swapped_model_do_not_see_one_another(build):
    model = attnzoo.swap(build("phi3"), GQA(num_kv_heads=2))
    documents = [torch.randint(2, 97, (1, n), generator=torch.Generator().manual_seed(n)) for n in (7, 11)]
    cu = torch.tensor([0, 7, 18], dtype=torch.int32)
    positions = torch.cat([torch.arange(7), torch.arange(11)])[None]
    got = logits(model, torch.cat(documents, 1), position_ids=positions, cu_seq_lens_q=cu, cu_seq_lens_k=cu)
    torch.testing.assert_close(got, torch.cat([logits(model, document) for document in documents], 1), **CLOSE)


def test_the_base_model_and_a_copy_swap_too(build, tokens):
    model = build("gpt_neox")
    want = logits(model, tokens)
    base = copy.deepcopy(model.gpt_neox)
    attnzoo.swap(base, GQA())
    swapped = copy.deepcopy(attnzoo.swap(model, GQA()))
    with torch.no_grad():
        states = base(tokens).last_hidden_state
        torch.testing.assert_close(model.get_output_embeddings()(states), want, **CLOSE)
    torch.testing.assert_close(logits(swapped, tokens), want, **CLOSE)
    model.get_submodule("gpt_neox.layers.0.attention").q_proj.weight.data.zero_()
    torch.testing.assert_close(logits(swapped, tokens), want, **CLOSE)
    assert torch.equal(
        swapped.state_dict()["gpt_neox.layers.0.attention.query_key_value.weight"],
        base.state_dict()["layers.0.attention.query_key_value.weight"],
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (GQA(num_kv_heads=3), "must divide"),
        (GQA(num_kv_heads=8), "must divide"),
        ([GQA(num_kv_heads=2)], "lists 1 layers, the model has 2"),
        ([GQA(num_kv_heads=2), "gqa"], "must be a GQA, MLA or Linear"),
        ([GQA(num_kv_heads=2), GQA(num_kv_heads=3)], "must divide"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused_and_changes_nothing(build, tokens, spec, message):
    model = build("llama")
    want, config = logits(model, tokens), model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        attnzoo.swap(model, spec)
    assert not layers(model) and model.config.to_dict() == config
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits(model, tokens), want)


def test_other_models_are_refused_with_the_known_ones():
    t5 = T5Model(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    for model in (t5, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"llama.*mistral.*bert"):
            attnzoo.swap(model, GQA())


def test_another_attn_implementation_on_a_swapped_model_is_refused(build, tokens):
    model = attnzoo.swap(build("llama"), GQA())
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation"):
        logits(model, tokens)
