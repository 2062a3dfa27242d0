"""Softmax attention on a GPU: every backend against the fp64 reference, and no quadratic memory where auto chooses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnzoo import ops
from attnzoo.masks import Causal, Full, SlidingWindow
from tests.support.compare import assert_as_accurate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def draw(heads, k_heads, q_len, k_len, dim, v_dim, *, batch=2, dtype=torch.bfloat16) -> list[Tensor]:
    shapes = ((heads, q_len, dim), (k_heads, k_len, dim), (k_heads, k_len, v_dim))
    return [torch.randn(batch, *s, device="cuda", dtype=dtype).requires_grad_() for s in shapes]


def plain(q, k, v, visible) -> Tensor:
    """Plain PyTorch without repeated keys: a group's queries are rows of one product.

    A library's product of 5 rows is another program than its product of 40, and sums more exactly: with keys repeated
    and 5 queries, the comparison would be between those two, and PyTorch's own two ways would fail it.
    """
    group = q.shape[1] // k.shape[1]
    rows = q.unflatten(1, (-1, group)).flatten(2, 3)
    scores = (rows @ k.mT).unflatten(2, (group, -1)).flatten(1, 2) * q.shape[-1] ** -0.5
    blind = ~visible.any(-1, keepdim=True)
    p = torch.softmax(scores.masked_fill(~visible, -math.inf).masked_fill(blind, 0), -1).masked_fill(blind, 0)
    return (p.unflatten(1, (-1, group)).flatten(2, 3) @ v).unflatten(2, (group, -1)).flatten(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(4, 4, 67, 67, 64, 64), (6, 2, 131, 131, 72, 72), (8, 1, 5, 261, 128, 128)])
@pytest.mark.parametrize("mask", [Full(), Causal(), SlidingWindow(40)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "tiled"])
def test_error_is_at_most_twice_that_of_plain_pytorch(backend, padded, mask, shape, dtype) -> None:
    inputs = draw(*shape, dtype=dtype)
    lengths = torch.tensor([shape[3] - 3, 0], device="cuda") if padded else None
    try:
        got = ops.attention(*inputs, mask=mask, key_lengths=lengths, backend=backend)
    except ValueError as refusal:
        assert backend == "sdpa" and "no backend can run this call\nsdpa: " in str(refusal)
        return
    # PyTorch's own fp32 kernel sums its gradients in an order that costs it a little more than plain PyTorch's error.
    slack = 2.0 if backend == "sdpa" and dtype == torch.float32 else 1.0
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = ops.attention(*exact, mask=mask, key_lengths=lengths, backend="reference")
    visible = mask.dense(shape[2], shape[3], device="cuda")
    if lengths is not None:
        visible = visible & (torch.arange(shape[3], device="cuda") < lengths[:, None])[:, None, None]
    own = [t.detach().clone().requires_grad_() for t in inputs]
    simple = plain(*own, visible)
    assert_as_accurate("out", got, simple, truth, slack=slack)
    weights = torch.randn_like(truth)
    grads = [torch.autograd.grad(o, i, weights.to(o.dtype)) for o, i in ((got, inputs), (simple, own), (truth, exact))]
    for name, *one in zip(("dq", "dk", "dv"), *grads, strict=True):
        assert_as_accurate(name, *one, slack=slack)


@pytest.mark.parametrize("backend", ["sdpa", "tiled"])
@pytest.mark.parametrize("mask", [Full(), Causal(), SlidingWindow(9)])
@pytest.mark.parametrize("poison", [0.0, math.nan])
def test_packed_documents_match_the_reference_and_leave_the_tail_zero(backend, mask, poison) -> None:
    inputs = draw(6, 2, 300, 300, 64, 64, batch=1)
    for t in inputs:
        t.data[:, :, 280:] = poison
    cu = torch.tensor([0, 5, 5, 133, 280], dtype=torch.int32, device="cuda")
    got = ops.attention(*inputs, mask=mask, cu_seqlens_q=cu, backend=backend)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = ops.attention(*exact, mask=mask, cu_seqlens_q=cu, backend="reference")
    same = [ops.attention(*(t.detach() for t in inputs), mask=mask, cu_seqlens_q=cu, backend="reference")]
    assert (got[:, :, 280:] == 0).all()
    assert (got.double() - truth).abs().max() <= 2 * (same[0].double() - truth).abs().max() + 2**-7 * truth.abs().max()
    weights = torch.randn_like(truth)
    got_grads = torch.autograd.grad(got, inputs, weights.to(got.dtype))
    for name, g, t in zip("qkv", got_grads, torch.autograd.grad(truth, exact, weights), strict=True):
        assert (g[:, :, 280:] == 0).all(), name
        assert (g.double() - t).abs().max() <= 0.02 * t.abs().max(), name


def test_auto_is_linear_in_memory_on_every_kind_of_call() -> None:
    def peak(length: int, case: str) -> float:
        options = {
            "causal": {"mask": Causal()},
            "window": {"mask": SlidingWindow(512)},
            "padded": {"key_lengths": torch.tensor([length - 3], device="cuda")},
            "padded causal": {"key_lengths": torch.tensor([length - 3], device="cuda"), "mask": Causal()},
            "softcap": {"mask": Causal(), "softcap": 30.0},
            "packed": {"cu_seqlens_q": torch.tensor([0, 100, length], device="cuda"), "mask": Causal()},
        }[case]
        inputs = draw(4, 1, length, length, 64, 64, batch=1, dtype=dtype)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ops.attention(*inputs, **options).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    for dtype in (torch.bfloat16, torch.float32):
        for case in ("causal", "window", "padded", "padded causal", "softcap", "packed"):
            short, long = peak(8192, case), peak(32768, case)
            assert long < 6 * short + 2**28, (case, dtype, short, long)  # 16 times would be quadratic


def test_compiles_without_a_graph_break_on_a_gpu() -> None:
    inputs = draw(4, 2, 128, 128, 64, 64, batch=1)
    cu = torch.tensor([0, 50, 128], dtype=torch.int32, device="cuda")
    for options in ({"mask": Causal()}, {"mask": Causal(), "cu_seqlens_q": cu}, {"mask": SlidingWindow(8)}):
        run = torch.compile(lambda q, k, v, o=options: ops.attention(q, k, v, **o), fullgraph=True)
        torch.testing.assert_close(run(*inputs), ops.attention(*inputs, **options), rtol=2e-2, atol=2e-2)


def test_a_packed_call_that_is_made_again_reads_its_own_tensors_and_boundaries() -> None:
    from attnzoo.ops.softmax.triton import launch

    def step(ends: tuple[int, int]) -> list[Tensor]:
        torch.manual_seed(ends[0])
        inputs = [t.requires_grad_() for t in draw(6, 2, 300, 300, 64, 64, batch=1)]
        cu = torch.tensor([0, *ends], dtype=torch.int32, device="cuda")
        options = {"mask": Causal(), "cu_seqlens_q": cu, "cu_seqlens_k": cu, "backend": "triton"}
        out, lse = ops.attention(*inputs, **options, return_lse=True)
        return [out, lse, *torch.autograd.grad(out, inputs, torch.randn_like(out))]

    wanted = []
    for ends in ((100, 300), (31, 211)):
        launch._RECORDED.clear()
        wanted.append(step(ends))
    launch._RECORDED.clear()
    for ends, want in zip(((100, 300), (31, 211), (31, 211)), (*wanted, wanted[1]), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(step(ends), want, strict=True))
    assert len(launch._RECORDED) == 2, "a forward and a backward of two documents"
