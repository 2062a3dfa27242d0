"""Hedgehog's learned features (arXiv 2402.04347): softmaxes of a head's projection and of its negative."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.launching import interpreted, is_plain, triton_reasons
from attnzoo.ops.linear.triton.launch import empty_like_heads, launch, rows_contiguous
from attnzoo.ops.linear.triton.shapes import power_of_two

_LARGEST = 128  # size of a head, whose weight is one tile; half of it in fp32
_ROWS = 16  # tokens of a program


def hedgehog_features(x: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """`[softmax(x W), softmax(-x W)]`, where the softmaxes run in fp32.

    Args:
        x: `[B, H, S, D]`; fp16, bf16, fp32 or fp64.
        weight: `[H, D, D]`, taken in x's dtype.
        backend: "auto", "triton" (one kernel, without a gradient; heads up to 128, in fp32 64) or "plain" (PyTorch).

    Returns:
        `[B, H, S, 2 * D]` in x's dtype.

    Raises:
        ValueError: for another shape of weight, or if the kernel is named and cannot run the call.
    """
    if backend not in ("auto", "triton", "plain"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'plain', got {backend!r}")
    size = x.shape[-1]
    if x.dim() != 4 or weight.shape != (x.shape[1], size, size):
        raise ValueError(f"x must be [B, H, S, D] and weight [H, D, D], got {list(x.shape)} and {list(weight.shape)}")
    if backend == "triton" or (backend == "auto" and x.device.type == "cuda" and not interpreted()):
        why = _reasons(x, weight)
        if not why:
            return (_features if is_plain(x) else hedgehog_triton)(x, weight.to(x.dtype))
        if backend == "triton":
            raise ValueError(f"hedgehog_features cannot run this call: {'; '.join(why)}")
    scores = x @ weight.to(x.dtype)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return torch.cat([scores.softmax(-1), (-scores).softmax(-1)], dim=-1).to(x.dtype)


def _reasons(x: Tensor, weight: Tensor) -> list[str]:
    """Why the kernel cannot run the call; empty if it can."""
    out = triton_reasons(x.device)
    if x.dtype == torch.float64:
        out.append("has no fp64")
    largest = _LARGEST // 2 if x.dtype == torch.float32 else _LARGEST
    if x.shape[3] > largest:
        out.append(f"takes heads of {largest} at most in {x.dtype}, here {x.shape[3]}")
    if 0 in x.shape:
        out.append("needs a row, a head and a token")
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out.append("has no gradient")
    if torch.is_autocast_enabled(x.device.type):
        out.append("leaves autocast to PyTorch")
    return out


def _features(x: Tensor, weight: Tensor) -> Tensor:
    """What the operator does; x and weight are of one dtype."""
    from attnzoo.ops.linear.triton.kernels_hedgehog import hedgehog

    x, weight = rows_contiguous(x), weight.contiguous()
    out = empty_like_heads(x, 2 * x.shape[3], x.dtype)
    rows = x.shape[0] * x.shape[2]
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    sizes = {"D": x.shape[3], "BD": power_of_two(x.shape[3]), "BM": _ROWS}
    options = {"PRECISION": "tf32" if tf32 else "ieee", "num_warps": 4, "num_stages": 1}
    strides = *x.stride()[:3], *out.stride()[:3]
    launch(hedgehog, (-(-rows // _ROWS), x.shape[1]), x, weight, out, *strides, x.shape[2], rows, **sizes, **options)
    return out


hedgehog_triton = torch.library.custom_op("attnzoo::hedgehog_triton", _features, mutates_args=())


@hedgehog_triton.register_fake
def _(x, weight):  # type: ignore[no-untyped-def]
    return empty_like_heads(x, 2 * x.shape[3], x.dtype)
