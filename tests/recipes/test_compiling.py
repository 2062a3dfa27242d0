"""What torch.compile is asked to compile, and how often it does."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, LlamaConfig

import attnzoo.hf  # noqa: F401
from recipes.compiling import compile_model
from recipes.packed import hidden_packed, pack


@pytest.fixture(autouse=True)
def forgets():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tiny(layers=3):
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2)
    return AutoModelForCausalLM.from_config(config, attn_implementation="attnzoo").train()


def batch(*lengths):
    return pack([np.arange(length) + 2 for length in lengths])


def test_all_layers_and_all_numbers_of_documents_share_what_is_compiled_once():
    model, counter = tiny(), CompileCounter()
    batches = [batch(9, 11), batch(20), batch(3, 4, 5, 8)]
    expected = [hidden_packed(model, one) for one in batches]
    compile_model(model, "layers", device="cpu", backend=counter, fullgraph=True)
    for one, want in zip(batches, expected, strict=True):
        torch.testing.assert_close(hidden_packed(model, one), want)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("choice", "device", "compiles"),
    [
        ("auto", "cpu", False),
        ("auto", "cuda", True),
        ("off", "cuda", False),
        ("model", "cpu", True),
        (True, "cpu", True),
    ],
)
def test_auto_compiles_on_a_gpu_alone(choice, device, compiles):
    model, counter = tiny(1), CompileCounter()
    compile_model(model, choice, device=device, backend=counter)
    hidden_packed(model, batch(9, 11))
    assert (counter.frame_count > 0) == bool(compiles)


def test_another_choice_is_refused():
    with pytest.raises(ValueError, match="compile must be one of auto, layers, model, off, got 'fast'"):
        compile_model(tiny(1), "fast", device="cpu")
