"""attnzoo.convert on models in memory and on folders."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTBigCodeForCausalLM

import attnzoo
from attnzoo import GQA
from attnzoo.conversion import Refusal
from attnzoo.masks import SlidingWindow
from tests.hf.conftest import FAMILIES

WITH_KV_HEADS = sorted(set(FAMILIES) - {"gpt_oss", "gpt2", "gpt_neox"})
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("family", WITH_KV_HEADS)
def test_a_model_in_memory_becomes_the_stock_model_that_its_folder_becomes(build, tokens, tmp_path, family):
    model = build(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new = attnzoo.convert(model, GQA(num_kv_heads=1), out=tmp_path / "from-memory")
    assert type(new) is type(model) and new.config.num_key_value_heads == 1 and not new.training
    torch.testing.assert_close(logits(new, tokens), logits(attnzoo.swap(build(family), GQA(1)), tokens), **CLOSE)

    model.save_pretrained(tmp_path / "source")
    path = attnzoo.convert(tmp_path / "source", GQA(num_kv_heads=1), out=tmp_path / "from-folder")
    assert path == tmp_path / "from-folder"
    folders = [AutoModelForCausalLM.from_pretrained(tmp_path / f"from-{name}") for name in ("memory", "folder")]
    for loaded in folders:
        assert loaded.config.num_key_value_heads == 1
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, new.state_dict()[name]), name

    for parameter in new.parameters():
        parameter.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_gpt2_with_one_kv_head_becomes_gpt_bigcode_with_equal_logits(build, tokens, tmp_path):
    model = build("gpt2")
    new = attnzoo.convert(model, GQA(num_kv_heads=1), out=tmp_path / "out")
    assert type(new) is GPTBigCodeForCausalLM
    with pytest.warns(UserWarning, match="gpt_bigcode"):
        swapped = attnzoo.swap(build("gpt2"), GQA(num_kv_heads=1))
    torch.testing.assert_close(logits(new, tokens), logits(swapped, tokens), **CLOSE)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded, tokens), logits(new, tokens), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_the_number_of_heads_that_is_there_changes_no_logit(build, tokens, family):
    model = build(family, dtype=torch.bfloat16).train()
    model.get_input_embeddings().weight.requires_grad_(False)
    new = attnzoo.convert(model, GQA(), method="random")
    assert new.training and {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert not new.get_input_embeddings().weight.requires_grad
    assert torch.equal(logits(new.eval(), tokens), logits(model.eval(), tokens))
    assert new.generation_config.to_dict() == model.generation_config.to_dict()


@pytest.mark.parametrize("method", ["mean", "first", "random"])
def test_methods_are_the_papers_three_and_auto_is_mean(build, method):
    model = build("llama", tie_word_embeddings=True)
    name = "model.layers.1.self_attn.v_proj.weight"
    heads = model.state_dict()[name].view(2, 2, 8, 32)
    new = attnzoo.convert(model, GQA(num_kv_heads=2), method=method, seed=3)
    got = new.state_dict()[name].view(2, 8, 32)
    if method == "random":
        again = attnzoo.convert(model, GQA(num_kv_heads=2), method=method, seed=3).state_dict()[name]
        other = attnzoo.convert(model, GQA(num_kv_heads=2), method=method, seed=4).state_dict()[name]
        assert torch.equal(got.view_as(again), again) and not torch.equal(again, other)
    else:
        torch.testing.assert_close(got, heads.mean(1) if method == "mean" else heads[:, 0])
    if method == "mean":
        auto = attnzoo.convert(model, GQA(num_kv_heads=2))
        assert torch.equal(auto.state_dict()[name].view_as(got), got)
    assert new.lm_head.weight is new.model.embed_tokens.weight


def test_a_swapped_model_that_was_trained_is_exported_by_convert(build, tokens, tmp_path):
    model = attnzoo.swap(build("qwen3"), GQA(num_kv_heads=1))
    new = attnzoo.convert(model, GQA(), out=tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), **CLOSE)
    assert not any("Swapped" in type(module).__name__ for module in new.modules())


@pytest.mark.parametrize(
    ("family", "spec", "options", "error", "message"),
    [
        ("llama", GQA(num_kv_heads=3), {}, ValueError, "must divide"),
        ("llama", [GQA(1), GQA(2)], {}, Refusal, "attnzoo.swap"),
        ("llama", GQA(1, mask=SlidingWindow(4)), {}, Refusal, "sliding window"),
        ("llama", GQA(1), {"calibration": [1]}, ValueError, "calibration"),
        ("llama", GQA(1), {"method": "svd"}, ValueError, "mean, first, random"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_and_writes_nothing(
    build, tmp_path, family, spec, options, error, message
):
    with pytest.raises(error, match=message):
        attnzoo.convert(build(family), spec, out=tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_nan_an_existing_folder_and_a_missing_out_are_refused(build, tmp_path):
    model = build("llama")
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists"):
        attnzoo.convert(model, GQA(1), out=tmp_path / "there")
    with pytest.raises(ValueError, match="out"):
        attnzoo.convert(tmp_path / "there", GQA(1))
    with pytest.raises(ValueError, match="source"):
        attnzoo.convert(torch.nn.Linear(2, 2), GQA(1))
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        attnzoo.convert(model, GQA(1), out=tmp_path / "out")
    with pytest.warns(UserWarning):
        attnzoo.swap(model, GQA(mask=SlidingWindow(4)))
    with pytest.raises(Refusal, match="swapped"):
        attnzoo.convert(model, GQA(1), out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_window_goes_into_the_stock_config(build, tokens):
    new = attnzoo.convert(build("mistral"), GQA(mask=SlidingWindow(3)))
    assert new.config.sliding_window == 3
    swapped = attnzoo.swap(build("mistral"), GQA(mask=SlidingWindow(3)))
    torch.testing.assert_close(logits(new, tokens), logits(swapped, tokens), **CLOSE)
