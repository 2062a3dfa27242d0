"""The fused kernels of softmax near and linear far, interpreted or native, against the fp64 reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import ops
from attnzoo.ops.linear.triton.hybrid import hybrid_attention_triton
from tests.support.compare import assert_as_accurate

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("out", "dq", "dk", "dv", "dfq", "dfk", "dgain")


def draw(heads: tuple[int, int], length: int, sizes: tuple[int, int, int], batch: int = 1) -> list[Tensor]:
    """Random q, k, v, features of both, and near weights, in fp64; sizes of keys, features and values."""
    generator = torch.Generator().manual_seed(length)
    dim, features, v_dim = sizes
    shapes = ((heads[0], dim), (heads[1], dim), (heads[1], v_dim), (heads[0], features), (heads[1], features))
    tensors = [torch.randn(batch, h, length, d, generator=generator, dtype=torch.float64) for h, d in shapes]
    return [t.to(DEVICE) for t in [*tensors, torch.rand(heads[0], generator=generator, dtype=torch.float64) + 0.1]]


def run(backend: str, tensors: list[Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Output and all gradients."""
    *inputs, gain = (t.to(dtype).detach().requires_grad_() for t in tensors)
    q, k, v, f_q, f_k = inputs
    given = {"q_features": f_q, "k_features": f_k, "near_weight": gain, "backend": backend}
    out = ops.hybrid_attention(q, k, v, **given, **options)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=DEVICE).reshape(out.shape)
    return [out, *torch.autograd.grad(out, [*inputs, gain], upstream.to(dtype))]


def compare(tensors: list[Tensor], dtype: torch.dtype, **options: Any) -> None:
    tensors = [t.to(dtype) for t in tensors]
    results = (run(*how, **options) for how in (("triton", tensors, dtype), ("reference", tensors, dtype)))
    truth = run("reference", tensors, torch.float64, **options)
    for name, got, plain, exact in zip(NAMES, *results, truth, strict=True):
        if (exact == 0).all():  # a window of one key, or over everything: nothing to be relative to
            assert got.abs().max() < 1e-7, name
            continue
        rows = [t.reshape(1, -1) for t in (got, plain, exact)]
        assert_as_accurate(name, *rows, slack=2.0 if name == "dgain" else 1.0)  # which is a sum of sums that cancel


@pytest.mark.parametrize(("length", "window"), [(71, 1), (71, 33), (20, 20), (13, 50), (1, 1)])
def test_outputs_and_gradients_are_those_of_the_reference(length: int, window: int) -> None:
    compare(draw((2, 1), length, (16, 24, 20)), torch.float32, window=window)


def test_heads_may_be_grouped_and_rows_padded() -> None:
    lengths = torch.tensor([0, 37], device=DEVICE)
    compare(draw((4, 2), 40, (20, 16, 16), batch=2), torch.float32, window=7, key_lengths=lengths, feature_map="relu")


def test_packed_documents_start_anew_and_rows_after_the_last_are_zero() -> None:
    tensors = draw((2, 2), 130, (16, 16, 16))
    ends = torch.tensor([0, 3, 3, 100, 127], device=DEVICE)
    compare(tensors, torch.float32, window=20, cu_seqlens=ends)
    q, k, v = (t.float() for t in tensors[:3])
    assert (ops.hybrid_attention(q, k, v, window=20, cu_seqlens=ends, backend="triton")[:, :, 127:] == 0).all()


def test_features_are_the_keys_and_queries_unless_given_and_may_be_fp16() -> None:
    q, k, v = (t.half().requires_grad_() for t in draw((2, 1), 50, (16, 16, 16))[:3])
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    got = ops.hybrid_attention(q, k, v, window=9, backend="triton")
    want = ops.hybrid_attention(*wide, window=9, backend="reference")
    torch.testing.assert_close(got.double(), want, rtol=5e-3, atol=5e-3)
    upstream = torch.linspace(-1, 1, want.numel(), device=DEVICE).reshape(want.shape)
    mine = torch.autograd.grad(got, (q, k, v), upstream.half())
    for a, b in zip(mine, torch.autograd.grad(want, wide, upstream.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("poison", [math.nan, 1e30])
@pytest.mark.parametrize("case", ["padded", "packed"])
def test_what_stands_in_padding_never_leaks(case: str, poison: float) -> None:
    inputs = [t.float() for t in draw((2, 1), 40, (16, 16, 16), batch=1 if case == "packed" else 2)[:3]]
    options: dict[str, Any] = {"key_lengths": torch.tensor([35, 0], device=DEVICE)}
    if case == "packed":
        options = {"cu_seqlens": torch.tensor([0, 6, 35], device=DEVICE)}
    results = []
    for value in (None, poison):
        tensors = [t.clone() for t in inputs]
        for t in tensors:
            if value is not None:
                t[0, :, 35:] = value
                t[1:] = value
        tensors = [t.requires_grad_() for t in tensors]
        out = ops.hybrid_attention(*tensors, window=4, **options, backend="triton")
        results.append([out, *torch.autograd.grad(out.sum(), tensors)])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_the_operator_passes_opcheck() -> None:
    q, k, v, f_q, f_k, gain = (t.float().requires_grad_() for t in draw((2, 1), 20, (16, 16, 16)))
    torch.library.opcheck(hybrid_attention_triton, (q, k, v, f_q, f_k, gain, None, None, 5, "elu", 0.25))


def test_heads_past_128_are_refused_with_the_reason() -> None:
    q, k, v = (t.float() for t in draw((1, 1), 4, (129, 1, 16))[:3])
    with pytest.raises(ValueError, match="takes keys of 1 to 128, here 129"):
        ops.hybrid_attention(q, k, v, window=2, backend="triton")
