"""The measurement of int8 caches: losses through a cache are those of the model, and int8 really is what is read."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from attnzoo.caches.quantization import Int8Storage

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("int8_perplexity")


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, num_key_value_heads=2, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.set_attn_implementation("attnzoo")
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 61, (2, 100), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("chunk", [7, 16, 100])
def test_losses_through_a_plain_cache_are_those_of_one_pass(script, model, tokens, chunk):
    losses, share = script.through_cache(model, tokens, "contiguous", chunk)
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    want = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(2, 99)
    torch.testing.assert_close(losses, want, rtol=1e-4, atol=1e-4)
    assert share == 0


@pytest.mark.parametrize("kind", ["int8", "paged_int8"])
def test_losses_through_int8_change_a_little_once_tokens_leave_the_newest(script, model, tokens, kind):
    plain, _ = script.through_cache(model, tokens, "contiguous", 4)
    losses, share = script.through_cache(model, tokens, kind, 4)
    change = (losses - plain).abs()
    torch.testing.assert_close(losses[:, :64], plain[:, :64], rtol=1e-4, atol=1e-4)
    assert 0 < change[:, 64:].max() < 0.1
    # After the step that ends at n tokens, n - 64 of them are read as int8, by each of its 4 queries.
    assert share == sum(4 * max(end - 64, 0) for end in range(4, 101, 4)) / sum(range(1, 101))


def test_losses_follow_what_int8_gives_back(script, model, tokens, monkeypatch):
    sound, _ = script.through_cache(model, tokens, "int8", 4)
    decode = Int8Storage.decode
    monkeypatch.setattr(Int8Storage, "decode", lambda self, parts: decode(self, parts) * 1.5)
    assert (script.through_cache(model, tokens, "int8", 4)[0] - sound).abs()[:, 64:].max() > 0.1


def test_the_change_of_perplexity_is_that_of_paired_losses(script):
    found = script.compared(torch.tensor([1.0, 3.0]), torch.tensor([0.9, 2.9]))
    assert found["perplexity"] == pytest.approx(7.38906, abs=1e-4)
    assert found["change_percent"] == pytest.approx(10.517, abs=1e-2)
    assert found["standard_error"] == pytest.approx(0, abs=1e-4)
