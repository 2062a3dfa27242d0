"""Time linear attention's kernels on a GPU beside flash-linear-attention and cuDNN's softmax, in one process.

    python scripts/bench_linear.py [--out docs/benchmarks/linear_h200.json] [--commit abc1234]

Needs `flash-linear-attention`; without it only the library's own times and the softmax's are taken. Feature maps count
on both sides. Every result is compared with fp64 before it is timed. Times are medians in milliseconds, on the device's
clock; what the host needs to launch a call stands beside them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from attnzoo import ops
from attnzoo.bench.timing import one_call
from attnzoo.ops.linear import State

SHAPES = ((8, 2048, 16, 128), (1, 16384, 16, 128), (4, 16384, 16, 64))  # batch, tokens, heads, dim
SOFTMAX = ((32, 512), (16, 1024), (8, 2048), (4, 4096), (2, 8192), (1, 16384))  # batch, tokens: 16k in all
STEP = (64, 32, 128)  # sequences, heads, dim
HYBRID = ((8, 2048, 16, 128, 64), (1, 16384, 16, 128, 64), (4, 16384, 16, 64, 64))  # and the window
MOST_ERROR = 0.01  # of a tensor, relative, against fp64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the rows here, as JSON")
    parser.add_argument("--commit", default="", help="what was measured")
    options = parser.parse_args()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "device": torch.cuda.get_device_name()}
    rows = []
    for row in measurements():
        rows.append(row)
        print(" ".join(f"{name}={shown(value)}" for name, value in row.items()), flush=True)
        if options.out:
            options.out.write_text(json.dumps(versions | {"commit": options.commit, "rows": rows}, indent=1) + "\n")


def measurements() -> Iterator[dict[str, Any]]:
    """Every row."""
    limit = limits()
    yield limit
    yield from steps(limit["gb_s"])
    for shape in SHAPES:
        yield from chunks(*shape, copy=limit["gb_s"])
    yield from softmax()
    for batch, length, heads, dim, window in HYBRID:
        yield from hybrid(batch, length, heads, dim, window)


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def time_ms(run: Callable[[], Any]) -> float:
    return one_call(run)[0]


def kernel_ms(run: Callable[[], Any], repeats: int = 10) -> float:
    """What the GPU's kernels take alone, without the gaps between them."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    return sum(e.device_time for e in profiler.events() if e.device_type == DeviceType.CUDA) / repeats / 1e3


def limits() -> dict[str, Any]:
    """The bandwidth of a large copy, read and written."""
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    ms = time_ms(lambda: target.copy_(source))
    return {"case": "copy", "ms": ms, "gb_s": 2 * source.nbytes / ms / 1e6}


def peers() -> dict[str, Callable[..., Tensor]]:
    """Their functions of q, k and v `[B, S, H, D]`, by mode and name."""
    try:
        from fla.ops.linear_attn import chunk_linear_attn
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return {}
    return {
        "elu normalised: chunk_linear_attn": lambda q, k, v: chunk_linear_attn(
            F.elu(q) + 1, F.elu(k) + 1, v, normalize=True
        )[0],
        "raw: chunk_linear_attn": lambda q, k, v: chunk_linear_attn(q, k, v, normalize=False)[0],
        "raw: chunk_simple_gla": lambda q, k, v: chunk_simple_gla(q, k, v)[0],
    }


def chunks(batch: int, length: int, heads: int, dim: int, copy: float) -> Iterator[dict[str, Any]]:
    """Forward and backward of one shape."""
    q, k, v = (random(batch, length, heads, dim).requires_grad_() for _ in range(3))
    d_out = random(batch, length, heads, dim)
    tensor_bytes = q.nbytes
    mine: dict[str, Callable[..., Tensor]] = {}
    for mode, choice in (("elu normalised", {}), ("raw", {"feature_map": "identity", "normalize": False})):
        mine[f"{mode}: attnzoo"] = lambda q, k, v, choice=choice: ops.linear_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), **choice, backend="triton"
        ).transpose(1, 2)
    for name, run in (mine | peers()).items():
        row: dict[str, Any] = {"case": f"{batch}x{length} H{heads} D{dim}", "name": name}
        out = run(q, k, v)
        grads = torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)
        if "attnzoo" in name:
            row["error"] = worst_error(name, (q, k, v), d_out, (out, *grads))
        row |= both_ways(lambda run=run: run(q, k, v), out, (q, k, v), d_out)
        row["forward_of_copy"] = 4 * tensor_bytes / row["forward_ms"] / 1e6 / copy
        row["backward_of_copy"] = 8 * tensor_bytes / row["backward_ms"] / 1e6 / copy
        yield row


def both_ways(
    forward: Callable[[], Tensor], out: Tensor, inputs: tuple[Tensor, ...], d_out: Tensor, *, kernels: bool = True
) -> dict[str, float]:
    """Times of a forward without a graph and of a backward, and of their kernels alone."""

    def run() -> None:
        with torch.no_grad():
            forward()

    def back() -> None:
        torch.autograd.grad(out, inputs, d_out, retain_graph=True)

    times = {}
    for name, call in (("forward", run), ("backward", back)):
        times[f"{name}_ms"], times[f"{name}_host_ms"] = one_call(call)
    if not kernels:
        return times
    return times | {"forward_kernels_ms": kernel_ms(run), "backward_kernels_ms": kernel_ms(back)}


def worst_error(name: str, inputs: tuple[Tensor, ...], d_out: Tensor, got: tuple[Tensor, ...]) -> float:
    """The largest relative error of output and gradients on two heads, of all tokens."""
    choice = {} if "elu" in name else {"feature_map": "identity", "normalize": False}
    exact = [t.detach()[:1, :, :2].double().transpose(1, 2).requires_grad_() for t in inputs]
    out = ops.linear_attention(*exact, **choice, backend="chunked")
    grads = torch.autograd.grad(out, exact, d_out[:1, :, :2].double().transpose(1, 2))
    errors = []
    for want, have in zip((out, *grads), got, strict=True):
        have = have[:1, :, :2].transpose(1, 2).double()
        errors.append(((have - want).norm() / want.norm()).item())
    assert max(errors) < MOST_ERROR, (name, errors)
    return max(errors)


def softmax() -> Iterator[dict[str, Any]]:
    """Causal softmax by cuDNN and normalised linear attention, 16k tokens in all, 16 heads of 128."""
    for batch, length in SOFTMAX:
        q, k, v = (random(batch, 16, length, 128) for _ in range(3))

        def cudnn(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        ours = time_ms(lambda q=q, k=k, v=v: ops.linear_attention(q, k, v, backend="triton"))
        yield {"case": f"{batch}x{length} H16 D128", "name": "softmax", "cudnn_ms": time_ms(cudnn), "linear_ms": ours}


def hybrid(batch: int, length: int, heads: int, dim: int, window: int) -> Iterator[dict[str, Any]]:
    """Softmax near and linear far: the fused kernels, and plain PyTorch in blocks where it has the memory."""
    q, k, v = (random(batch, heads, length, dim).requires_grad_() for _ in range(3))
    d_out = random(batch, heads, length, dim)
    for backend in ("triton", "blocked"):
        row: dict[str, Any] = {
            "case": f"{batch}x{length} H{heads} D{dim}, window {window}",
            "name": f"hybrid: {backend}",
        }
        try:
            out = ops.hybrid_attention(q, k, v, window=window, backend=backend)
            grads = torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)
            row["error"] = hybrid_error((q, k, v), d_out, (out, *grads), window)
            forward = lambda b=backend: ops.hybrid_attention(q, k, v, window=window, backend=b)  # noqa: E731
            row |= both_ways(forward, out, (q, k, v), d_out, kernels=backend == "triton")
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
        yield row


def hybrid_error(inputs: tuple[Tensor, ...], d_out: Tensor, got: tuple[Tensor, ...], window: int) -> float:
    """The largest relative error of output and gradients on one head, of all tokens."""
    exact = [t.detach()[:1, :1].double().requires_grad_() for t in inputs]
    out = ops.hybrid_attention(*exact, window=window, backend="blocked")
    grads = torch.autograd.grad(out, exact, d_out[:1, :1].double())
    errors = [
        ((have[:1, :1].double() - want).norm() / want.norm()).item()
        for want, have in zip((out, *grads), got, strict=True)
    ]
    assert max(errors) < MOST_ERROR, errors
    return max(errors)


def steps(copy: float) -> Iterator[dict[str, Any]]:
    """One token a sequence over its state, four and sixteen."""
    batch, heads, dim = STEP
    for tokens in (1, 4, 16):
        q, k, v = (random(batch, heads, tokens, dim) for _ in range(3))
        s, z = torch.randn(batch, heads, dim, dim, device="cuda"), torch.rand(batch, heads, dim, device="cuda") + 1
        for name, state in (("normalised", State(s, z)), ("raw", State(s, None))):
            exact = State(*(None if t is None else t.double() for t in state))
            have = State(*(None if t is None else t.clone() for t in state))
            got = ops.linear_step(q, k, v, have, backend="triton")
            want = ops.linear_step(*(t.double() for t in (q, k, v)), exact, backend="recurrent")
            assert (got - want).norm() / want.norm() < MOST_ERROR and torch.allclose(
                have.s.double(), exact.s, atol=1e-3
            )
            ms = time_ms(lambda q=q, k=k, v=v, have=have: ops.linear_step(q, k, v, have, backend="triton"))
            yield {
                "case": f"step of {tokens}, {batch} x {heads} states of {dim}x{dim}",
                "name": name,
                "ms": ms,
                "of_copy": 2 * s.nbytes / ms / 1e6 / copy,
            }
        try:
            from fla.ops.linear_attn import fused_recurrent_linear_attn
        except ImportError:
            continue
        rows = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
        ms = time_ms(
            lambda rows=rows, s=s: fused_recurrent_linear_attn(
                *rows, initial_state=s, output_final_state=True, normalize=False
            )
        )
        case = f"step of {tokens}, {batch} x {heads} states of {dim}x{dim}"
        yield {"case": case, "name": "raw: fla", "ms": ms, "of_copy": 2 * s.nbytes / ms / 1e6 / copy}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
