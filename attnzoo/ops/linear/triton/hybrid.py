"""Softmax near and linear attention far in fused kernels, as an operator with a gradient.

The far keys come `window` tokens late: linear attention's kernels, which take what the near keys give as they finish.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.eager import with_shortcut
from attnzoo.ops.launching import is_plain, triton_reasons
from attnzoo.ops.linear.triton.backward import States, Walk, grad_keys, grad_queries, grad_values, sum_gradients
from attnzoo.ops.linear.triton.forward import read_out, sum_keys
from attnzoo.ops.linear.triton.given import Given
from attnzoo.ops.linear.triton.launch import empty_like_heads, rows_contiguous
from attnzoo.ops.linear.triton.near import Near
from attnzoo.ops.linear.triton.shapes import Config, Parts, configure, cut

LARGEST = 128  # of features, keys and values: all of them stand in a program's registers


def hybrid_reasons(q: Tensor, f_q: Tensor, v: Tensor) -> list[str]:
    """Why the fused kernels cannot run on these heads; empty if they can."""
    out = triton_reasons(q.device)
    if not q.dtype == f_q.dtype == v.dtype or q.dtype == torch.float64:
        out.append("takes fp16, bf16 or fp32, the same for everything")
    for name, size in (("keys", q.shape[3]), ("features", f_q.shape[3]), ("values", v.shape[3])):
        if not 1 <= size <= LARGEST:
            out.append(f"takes {name} of 1 to {LARGEST}, here {size}")
    if 0 in q.shape[:3]:
        out.append("needs a row, a head and a token")
    return out


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f_q: Tensor | None,
    f_k: Tensor | None,
    gain: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output; `[B, Hq, S]` of 1 / the normaliser, the largest near score and its key; the sums of the parts.

    Where no features are given they are the queries and the keys themselves.
    """
    q, k, v = (rows_contiguous(t) for t in (q, k, v))
    f_q, f_k = q if f_q is None else rows_contiguous(f_q), k if f_k is None else rows_contiguous(f_k)
    config, parts = _plan(v, f_q, k, cu_seqlens)
    packed = cu_seqlens is not None  # then there may be rows that no program writes
    out = empty_like_heads(q, v.shape[3], v.dtype, zero=packed)
    inverses, top, weights = (_numbers(q, zero=packed) for _ in range(3))
    arg = torch.zeros_like(top, dtype=torch.int32) if packed else torch.empty_like(top, dtype=torch.int32)
    near = Near(q, k, v, gain.contiguous(), key_lengths, cu_seqlens, window, scale, config)
    near.attend(out, weights, top, arg)
    sums, z_sums = top.new_empty(0), top.new_empty(0)
    before: States = (None, None, None, None)
    if parts.several:
        sums, z_sums = sum_keys(f_k, v, None, key_lengths, cu_seqlens, feature_map, True, parts, config, lag=window)
        before = (None, None, sums, z_sums)
    where, kind = (None, key_lengths, cu_seqlens), (feature_map, True, True, 1.0)
    far = (f_q, f_k, v, out, inverses, before, (None, None), *where, *kind, parts, config)
    read_out(*far, near_weights=weights, lag=window)
    return out, inverses, top, arg, sums, z_sums


def _differentiate(
    d_out: Tensor,
    out: Tensor,
    inverses: Tensor,
    top: Tensor,
    arg: Tensor,
    sums: Tensor,
    z_sums: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f_q: Tensor | None,
    f_k: Tensor | None,
    gain: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the features (empty where they are q and k themselves) and the near weights' factor."""
    d_out, q, k, v = (rows_contiguous(t) for t in (d_out, q, k, v))
    alike = f_q is None, f_k is None
    f_q, f_k = q if f_q is None else rows_contiguous(f_q), k if f_k is None else rows_contiguous(f_k)
    config, parts = _plan(v, f_q, k, cu_seqlens)
    packed = cu_seqlens is not None
    d_fq, d_fk, d_v = (empty_like_heads(t, t.shape[3], t.dtype, zero=packed) for t in (f_q, f_k, v))
    d_q = d_fq if alike[0] else empty_like_heads(q, q.shape[3], q.dtype, zero=packed)
    d_k = d_fk if alike[1] else empty_like_heads(k, k.shape[3], k.dtype, zero=packed)
    dots, row_sums = _numbers(q, zero=packed), _numbers(q, zero=packed)
    none = dots.new_empty(0)
    states = (none, none, sums, z_sums)
    x = Given(d_out, None, None, out, inverses, *states, f_q, f_k, v, None, None, None, key_lengths, cu_seqlens)
    before: States = (None, None, None, None)
    after: States = before
    if parts.several:
        before = (None, None, sums, z_sums)
        after = (None, None, *sum_gradients(x, dots, feature_map, True, 1.0, parts, config, lag=window))
    how = Walk(config, feature_map, True, True, 1.0)
    grad_queries(x, dots, d_fq, before, how, parts, find_dots=True, lag=window)
    grad_keys(x, dots, d_fk, after, (None, None), how, parts, lag=window)
    grad_values(x, d_v, after, how, parts, lag=window)
    near = Near(q, k, v, gain.contiguous(), key_lengths, cu_seqlens, window, scale, config)
    near.differentiate(d_out, inverses, dots, top, arg, row_sums, (d_q, d_k, d_v), alike)
    d_fq, d_fk = d_fq.new_empty(0) if alike[0] else d_fq, d_fk.new_empty(0) if alike[1] else d_fk
    return d_q, d_k, d_v, d_fq, d_fk, row_sums.sum((0, 2)).to(gain.dtype)


def _plan(v: Tensor, f_q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> tuple[Config, Parts]:
    config = configure(f_q.shape[3], v.shape[3], f_q.dtype, v.dtype)
    return config, cut(f_q.shape[0], k.shape[1], f_q.shape[2], config, f_q.device, cu_seqlens)


def _numbers(q: Tensor, *, zero: bool) -> Tensor:
    """Room for one number a query."""
    return (torch.zeros if zero else torch.empty)(q.shape[:3], dtype=torch.float32, device=q.device)


hybrid_attention_triton = torch.library.custom_op("attnzoo::hybrid_attention_triton", _forward, mutates_args=())
hybrid_attention_triton_backward = torch.library.custom_op(
    "attnzoo::hybrid_attention_triton_backward", _differentiate, mutates_args=()
)


@hybrid_attention_triton.register_fake
def _(q, k, v, f_q, f_k, gain, key_lengths, cu_seqlens, window, feature_map, scale):  # type: ignore[no-untyped-def]
    f_q = q if f_q is None else f_q
    _, parts = _plan(v, f_q, k, cu_seqlens)
    shape = (parts.programs, k.shape[1], f_q.shape[3]) if parts.several else (0,)
    numbers = [_numbers(q, zero=False) for _ in range(2)]
    return (
        empty_like_heads(q, v.shape[3], v.dtype),
        *numbers,
        torch.empty_like(numbers[0], dtype=torch.int32),
        numbers[0].new_empty((*shape, v.shape[3]) if parts.several else shape),
        numbers[0].new_empty(shape),
    )


@hybrid_attention_triton_backward.register_fake
def _(d_out, out, inverses, top, arg, sums, z_sums, q, k, v, f_q, f_k, gain, *rest):  # type: ignore[no-untyped-def]
    d_features = (q.new_empty(0) if t is None else empty_like_heads(t, t.shape[3], t.dtype) for t in (f_q, f_k))
    return *(empty_like_heads(t, t.shape[3], t.dtype) for t in (q, k, v)), *d_features, gain.new_empty(gain.shape)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*output, *inputs[:8])
    ctx.rest = inputs[8:]


def _backward(ctx, d_out, *_):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    differentiate = _differentiate if is_plain(d_out) else hybrid_attention_triton_backward
    d_q, d_k, d_v, d_fq, d_fk, d_gain = differentiate(d_out, *saved, *ctx.rest)
    d_fq, d_fk = (None if f is None else d for f, d in zip(saved[9:11], (d_fq, d_fk), strict=True))
    return d_q, d_k, d_v, d_fq, d_fk, d_gain, *([None] * 5)


hybrid_attention_triton.register_autograd(_backward, setup_context=_save)
hybrid_attention = with_shortcut(hybrid_attention_triton, _forward, _save, _backward)
