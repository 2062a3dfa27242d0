"""attnzoo.convert of some layers, chosen by damage."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, MinistralForCausalLM, Qwen2ForCausalLM

import attnzoo
from attnzoo import GQA
from attnzoo.conversion import ConversionError
from attnzoo.conversion.hybrid import KVBudget
from attnzoo.hf.auto import SwappedModel
from attnzoo.masks import Causal, GlobalTokens, SlidingWindow

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
WINDOW = GQA(mask=SlidingWindow(3))
SINKS = GQA(mask=SlidingWindow(3) | GlobalTokens(2) & Causal())


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


def llama(build, **changes):
    return build("llama", attention_bias=False, num_hidden_layers=4, **changes)


@pytest.fixture
def text():
    return torch.randint(2, 97, (2, 16), generator=torch.Generator().manual_seed(3))


def divergence(model, other, tokens):
    old, new = (logits(one, tokens)[:, :-1].log_softmax(-1).double() for one in (model, other))
    return float((old.exp() * (old - new)).sum(-1).mean())


def swapped(model, layers, spec=WINDOW):
    """The model with a mask in some layers, by another way than `convert`."""
    return attnzoo.swap(model, [spec if n in layers else GQA() for n in range(model.config.num_hidden_layers)])


@pytest.mark.filterwarnings("ignore:save_pretrained")
def test_each_layers_damage_is_the_divergence_when_it_alone_is_changed(build, text):
    told = []
    attnzoo.convert(llama(build), WINDOW, layers=2, calibration=text, report=told.append)
    damage = told[0]
    true = [divergence(llama(build), swapped(llama(build), [n]), text) for n in range(4)]
    assert damage.alone == pytest.approx(true, rel=1e-3, abs=1e-7)
    assert damage.changed == sorted(sorted(range(4), key=lambda n: true[n])[:2])
    together = swapped(llama(build), damage.changed)
    assert damage.kl == pytest.approx(divergence(llama(build), together, text), rel=1e-3, abs=1e-7)
    assert [layer.attention_error > 0 for layer in damage.layers] == [n in damage.changed for n in range(4)]
    assert [layer.stream_error > 0 for layer in damage.layers] == [n >= damage.changed[0] for n in range(4)]


@pytest.mark.filterwarnings("ignore:save_pretrained")
def test_a_llama_with_windows_in_some_layers_is_a_stock_ministral(build, text, tmp_path):
    model = llama(build)
    new = attnzoo.convert(model, WINDOW, layers=[1, 3], out=tmp_path / "out")
    assert type(new) is MinistralForCausalLM
    assert new.config.layer_types == ["full_attention", "sliding_attention"] * 2 and new.config.sliding_window == 3
    torch.testing.assert_close(logits(new, text), logits(swapped(llama(build), [1, 3]), text), **CLOSE)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert type(loaded) is MinistralForCausalLM and loaded.config.attnzoo["layers"] == [1, 3]
    torch.testing.assert_close(logits(loaded, text), logits(new, text), atol=0, rtol=0)
    assert loaded.generate(text, max_new_tokens=4, do_sample=False).shape == (2, 20)
    for parameter in new.parameters():
        parameter.data.zero_()
    assert logits(model, text).abs().max() > 0


def test_qwen2_holds_windows_in_some_layers_itself(build, text):
    model = build("qwen2", use_sliding_window=False, layer_types=None, max_window_layers=28)
    assert set(model.config.layer_types) == {"full_attention"}
    new = attnzoo.convert(model, WINDOW, layers=[1])
    assert type(new) is Qwen2ForCausalLM
    assert new.config.layer_types == ["full_attention", "sliding_attention"]
    assert new.config.use_sliding_window and new.config.sliding_window == 3
    torch.testing.assert_close(logits(new, text), logits(swapped(model, [1]), text), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2", "phi3"])
@pytest.mark.filterwarnings("ignore:save_pretrained")
def test_a_window_as_long_as_the_text_changes_no_logit(build, text, family):
    full = {"sliding_window": None} if family in ("mistral", "phi3") else {}
    full |= {"layer_types": ["full_attention"] * 2} if family in ("qwen2", "gemma2") else {}
    full |= {"attention_bias": False} if family == "llama" else {}
    model = build(family, **full)
    new = attnzoo.convert(model, GQA(mask=SlidingWindow(16)), layers=[1])
    assert (logits(new, text) - logits(model, text)).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore:save_pretrained")
def test_kept_first_tokens_are_seen_and_saved(build, text, tmp_path):
    new = attnzoo.convert(llama(build), SINKS, layers=2, calibration=text, out=tmp_path / "out")
    assert isinstance(new, SwappedModel)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, text), logits(new, text))
    told = []
    attnzoo.convert(llama(build), SINKS, layers=[0, 1], calibration=text, report=told.append)
    # 5 of 16 keys in half of the layers
    assert told[0].length == 16 and told[0].kv_bytes == round(told[0].kv_bytes_before * (16 + 5) / 32)


@pytest.mark.filterwarnings("ignore:save_pretrained")
def test_a_budget_changes_as_few_layers_as_it_needs(build, text):
    told = []
    for share in (0.9, 0.5, 0.2):
        attnzoo.convert(llama(build), WINDOW, layers=KVBudget(share, 32), calibration=text, report=told.append)
    # A window of 3 keeps 3 of 32 tokens: each layer saves 29 / 128 of the whole.
    assert [len(damage.changed) for damage in told] == [1, 3, 4]
    for damage, share in zip(told, (0.9, 0.5, 0.2), strict=True):
        assert damage.kv_bytes <= share * damage.kv_bytes_before
        assert damage.changed == sorted(sorted(range(4), key=lambda n: damage.alone[n])[: len(damage.changed)])
    with pytest.raises(ConversionError, match=r"0\.094"):
        attnzoo.convert(llama(build), WINDOW, layers=KVBudget(0.05, 32), calibration=text)


@pytest.mark.filterwarnings("ignore:save_pretrained")
def test_a_folder_becomes_a_folder_with_its_tokenizer(build, text, tmp_path):
    llama(build, dtype=torch.bfloat16).save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    path = attnzoo.convert(tmp_path / "in", WINDOW, layers=3, calibration=text, out=tmp_path / "out")
    assert path == tmp_path / "out" and (path / "tokenizer.json").read_text() == "{}"
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    assert type(loaded) is MinistralForCausalLM and loaded.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("spec", "layers", "match"),
    [
        (WINDOW, 5, "from 1 to 4"),
        (WINDOW, [4], "0 to 3"),
        (WINDOW, 2, "calibration"),
        (GQA(), [1], "changes nothing"),
        (GQA(1, mask=SlidingWindow(3)), [1], "num_kv_heads"),
        ([WINDOW] * 4, [1], "list of specs"),
    ],
)
def test_a_request_that_does_not_fit_is_an_error(build, spec, layers, match):
    with pytest.raises(ConversionError, match=match):
        attnzoo.convert(llama(build), spec, layers=layers)


def test_a_list_of_specs_says_itself_where_windows_go(build, text):
    new = attnzoo.convert(llama(build), [GQA(), WINDOW, GQA(), WINDOW])
    assert new.config.layer_types == ["full_attention", "sliding_attention"] * 2


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True}),  # Ministral has no biases
        ("mistral", {}),  # its own window is 5, and a config holds one
        ("phi3", {"sliding_window": None}),  # one window for all layers
        ("gemma3_text", {}),  # kinds of layers rotate differently
    ],
)
@pytest.mark.filterwarnings("ignore:save_pretrained")
def test_windows_that_no_stock_class_holds_are_held_by_a_swapped_model(build, text, tmp_path, family, changes):
    model = build(family, **changes)
    new = attnzoo.convert(model, GQA(mask=SlidingWindow(3)), layers=[1], out=tmp_path / "out")
    assert isinstance(new, SwappedModel)
    torch.testing.assert_close(logits(new, text), logits(swapped(model, [1]), text), **CLOSE)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, text), logits(new, text))
