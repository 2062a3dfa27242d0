"""Softmax near and linear attention far in fused kernels, as an operator with a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.launching import is_plain, triton_reasons
from attnzoo.ops.linear.triton.backward import sum_gradients
from attnzoo.ops.linear.triton.eager import with_shortcut
from attnzoo.ops.linear.triton.forward import sum_keys
from attnzoo.ops.linear.triton.given import Given
from attnzoo.ops.linear.triton.launch import constants, empty_like_heads, launch, rows_contiguous, strides
from attnzoo.ops.linear.triton.shapes import Config, Parts, configure, cut, hybrid_tiles, power_of_two

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
    f_q: Tensor,
    f_k: Tensor,
    gain: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output; `[B, Hq, S]` of 1 / the normaliser, the largest near score and its key; the sums of the parts."""
    from attnzoo.ops.linear.triton import kernels_hybrid as kernels

    q, k, v, f_q, f_k = (rows_contiguous(t) for t in (q, k, v, f_q, f_k))
    config, parts = _plan(q, v, f_q, k, cu_seqlens)
    packed = cu_seqlens is not None
    out = empty_like_heads(q, v.shape[3], v.dtype, zero=packed)
    inverses, top = (torch.zeros(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    arg = torch.zeros(q.shape[:3], dtype=torch.int32, device=q.device)
    none = torch.empty(0, dtype=torch.float32, device=q.device)
    sums, z_sums = none, none.clone()
    if parts.several:
        sums, z_sums = sum_keys(f_k, v, None, key_lengths, cu_seqlens, feature_map, True, parts, config, lag=window)
    launch(
        kernels.hybrid_attend,
        (parts.programs, q.shape[1]),
        q,
        k,
        v,
        f_q,
        f_k,
        gain.contiguous(),
        out,
        inverses,
        top,
        arg,
        sums if parts.several else None,
        z_sums if parts.several else None,
        key_lengths,
        cu_seqlens,
        parts.table,
        *strides(q, k, v, f_q, f_k, out),
        q.shape[2],
        parts.parts,
        parts.part,
        window,
        scale,
        **kernel_constants(config, q.shape[3], feature_map, q.shape[1] // k.shape[1]),
    )
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
    f_q: Tensor,
    f_k: Tensor,
    gain: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the features and the near weights' factor."""
    from attnzoo.ops.linear.triton import kernels_hybrid_backward as kernels

    d_out, q, k, v, f_q, f_k = (rows_contiguous(t) for t in (d_out, q, k, v, f_q, f_k))
    config, parts = _plan(q, v, f_q, k, cu_seqlens)
    packed = cu_seqlens is not None
    d_q, d_k, d_v, d_fq, d_fk = (empty_like_heads(t, t.shape[3], t.dtype, zero=packed) for t in (q, k, v, f_q, f_k))
    dots, row_sums = torch.zeros_like(inverses), torch.zeros_like(inverses)
    gain = gain.contiguous()
    options = kernel_constants(config, q.shape[3], feature_map, q.shape[1] // k.shape[1])
    where = (key_lengths, cu_seqlens, parts.table)
    sizes = (q.shape[2], parts.parts, parts.part, window, scale)
    late: tuple[Tensor | None, Tensor | None] = (None, None)
    if parts.several:
        none = inverses.new_empty(0)
        given = Given(
            d_out, None, None, out, inverses, none, none, none, none, f_q, f_k, v, None, None, None, *where[:2]
        )
        late = sum_gradients(given, dots, feature_map, True, 1.0, parts, config, lag=window)
    launch(
        kernels.hybrid_grad_queries,
        (parts.programs, q.shape[1]),
        q,
        k,
        v,
        f_q,
        f_k,
        gain,
        d_out,
        out,
        inverses,
        top,
        arg,
        dots,
        row_sums,
        d_q,
        d_fq,
        sums if parts.several else None,
        z_sums if parts.several else None,
        *where,
        *strides(q, k, v, f_q, f_k, d_out, out, d_q, d_fq),
        *sizes,
        **options,
    )
    launch(
        kernels.hybrid_grad_keys,
        (parts.programs, k.shape[1]),
        q,
        k,
        v,
        f_q,
        f_k,
        gain,
        d_out,
        inverses,
        top,
        arg,
        dots,
        row_sums,
        d_k,
        d_v,
        d_fk,
        *late,
        *where,
        *strides(q, k, v, f_q, f_k, d_out, d_k, d_v, d_fk),
        *sizes,
        **options,
    )
    return d_q, d_k, d_v, d_fq, d_fk, row_sums.sum((0, 2)).to(gain.dtype)


def _plan(q: Tensor, v: Tensor, f_q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> tuple[Config, Parts]:
    config = configure(f_q.shape[3], v.shape[3], q.dtype, v.dtype)
    return config, cut(q.shape[0], k.shape[1], q.shape[2], config, q.device, cu_seqlens)


def kernel_constants(config: Config, dim: int, feature_map: str, group: int) -> dict[str, Any]:
    """Constants and launch options: unlike elsewhere, every tile has all columns."""
    options = constants(config, hybrid_tiles(config), True, feature_map, GROUP=group)
    options |= {"F": config.dim, "BF": options["BD"], "D": dim, "BD": power_of_two(dim, config.least)}
    del options["NORMALIZE"]
    return options


hybrid_attention_triton = torch.library.custom_op("attnzoo::hybrid_attention_triton", _forward, mutates_args=())
hybrid_attention_triton_backward = torch.library.custom_op(
    "attnzoo::hybrid_attention_triton_backward", _differentiate, mutates_args=()
)


@hybrid_attention_triton.register_fake
def _(q, k, v, f_q, f_k, gain, key_lengths, cu_seqlens, window, feature_map, scale):  # type: ignore[no-untyped-def]
    wide = {"dtype": torch.float32, "device": q.device}
    _, parts = _plan(q, v, f_q, k, cu_seqlens)
    shape = (parts.programs, k.shape[1], f_q.shape[3]) if parts.several else (0,)
    return (
        empty_like_heads(q, v.shape[3], v.dtype),
        torch.empty(q.shape[:3], **wide),
        torch.empty(q.shape[:3], **wide),
        torch.empty(q.shape[:3], dtype=torch.int32, device=q.device),
        torch.empty((*shape, v.shape[3]) if parts.several else shape, **wide),
        torch.empty(shape, **wide),
    )


@hybrid_attention_triton_backward.register_fake
def _(d_out, out, inverses, top, arg, sums, z_sums, q, k, v, f_q, f_k, gain, *rest):  # type: ignore[no-untyped-def]
    return *(empty_like_heads(t, t.shape[3], t.dtype) for t in (q, k, v, f_q, f_k)), gain.new_empty(gain.shape)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*output, *inputs[:8])
    ctx.rest = inputs[8:]


def _backward(ctx, d_out, *_):  # type: ignore[no-untyped-def]
    differentiate = _differentiate if is_plain(d_out) else hybrid_attention_triton_backward
    return *differentiate(d_out, *ctx.saved_tensors, *ctx.rest), *([None] * 5)


hybrid_attention_triton.register_autograd(_backward, setup_context=_save)
hybrid_attention = with_shortcut(hybrid_attention_triton, _forward, _save, _backward)
