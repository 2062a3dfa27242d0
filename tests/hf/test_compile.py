"""attn_implementation="attnzoo" and swapped models under torch.compile."""

from __future__ import annotations

import pytest
import torch
from transformers import CompileConfig

import attnzoo
from tests.hf.conftest import padding

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture
def fresh_compiler():
    """Recompilations are counted per function, over all tests."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("swapped", [False, True])
def test_a_compiled_forward_gives_the_same_logits_without_a_graph_break(build, tokens, swapped):
    model = build("llama", implementation="attnzoo")
    if swapped:
        attnzoo.swap(model, attnzoo.GQA(num_kv_heads=2))
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    cases = [
        {},
        {"attention_mask": padding((12, 7, 4), 12, "right")},
        {"position_ids": torch.arange(12)[None] % 5},
    ]
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for inputs in cases:
            want = model(tokens, use_cache=False, **inputs).logits
            torch.testing.assert_close(forward(tokens, use_cache=False, **inputs).logits, want, **CLOSE)
        packed = {
            "position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None],
            "cu_seq_lens_q": cu,
            "cu_seq_lens_k": cu,
        }
        want = model(tokens[:1], use_cache=False, **packed).logits
        torch.testing.assert_close(forward(tokens[:1], use_cache=False, **packed).logits, want, **CLOSE)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_compiled_decoding_with_a_static_cache_gives_the_tokens_of_no_cache(build, tokens, family):
    model = build(family, implementation="attnzoo")
    mask = padding((12, 7, 4), 12, "left")
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    want = model.generate(tokens * mask, use_cache=False, **options)
    compiling = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiling._compile_all_devices = True  # transformers compiles on GPUs only unless told otherwise
    got = model.generate(tokens * mask, cache_implementation="static", compile_config=compiling, **options)
    assert torch.equal(got, want)
