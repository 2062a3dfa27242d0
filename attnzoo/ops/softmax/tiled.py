"""Attention a row of tiles at a time, in plain PyTorch: every option, any device, memory linear in sequence length.

FlashAttention's plan (arXiv 2205.14135, 2307.08691): only tiles that the mask's block map names are computed, and the
backward computes their scores again. One operator each way, opaque to torch.compile, so that lengths and
boundaries may be read from tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnzoo.ops.softmax.common import Call, accumulation_dtype
from attnzoo.ops.softmax.rows import Inputs, rows_of_tiles


def reasons(call: Call) -> list[str]:
    """Why this backend cannot run the call: never."""
    return []


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Output `[B, Hq, Sq, Dv]` in the inputs' dtype and logsumexp `[B, Hq, Sq]`."""
    dense, text = (call.mask, "") if isinstance(call.mask, Tensor) else (None, call.mask.text)
    return tiled_attention(
        call.q,
        call.k,
        call.v,
        call.sinks,
        dense,
        call.key_lengths,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        torch.randint(1 << 62, ()) if call.dropout_p > 0 else None,
        text,
        call.scale,
        call.softcap or 0.0,
        call.dropout_p,
        None if call.bias is None else call.bias.reshape((1,) * (4 - call.bias.dim()) + call.bias.shape),
        None if call.alibi_slopes is None else call.alibi_slopes.reshape(-1, call.q.shape[1]),
    )


@torch.library.custom_op("attnzoo::tiled_attention", mutates_args=())
def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    dense: Tensor | None,
    key_lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    mask: str,
    scale: float,
    softcap: float,
    dropout_p: float,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The forward. `mask` is a mask's `text`, or empty where `dense` is given; `softcap` 0 means none.

    `bias` has four dimensions, each whole or 1; `slopes` are `[1|B, Hq]`.
    """
    x = Inputs(q, k, v, sinks, dense, key_lengths, cu_q, cu_k, seed, mask, scale, softcap, dropout_p, bias, slopes)
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    lse = q.new_full(q.shape[:3], -math.inf, dtype=accumulation_dtype(q.dtype))
    with torch.autocast(q.device.type, enabled=False):
        for row in rows_of_tiles(x):
            tile = x.load(row)
            p, total, top = tile.exponentials()  # [b, h, G, r, n], the others [b, h, G, r, 1]
            row_lse = top + torch.log(total)
            if tile.sees is not None:
                row_lse = row_lse.masked_fill(~tile.sees, -math.inf)
            p = x.drop(p, row)
            row_out = (p.flatten(2, 3) @ tile.v).unflatten(2, p.shape[2:4]) / total  # scaled once, at the end
            out[:, row.q_heads, row.queries] = row_out.flatten(1, 2).to(q.dtype)
            lse[:, row.q_heads, row.queries] = row_lse.squeeze(-1).flatten(1, 2)
    return out, lse


@torch.library.custom_op("attnzoo::tiled_attention_backward", mutates_args=())
def tiled_attention_backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    dense: Tensor | None,
    key_lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    mask: str,
    scale: float,
    softcap: float,
    dropout_p: float,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    wants_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the sinks and the bias; those that nobody wants are empty.

    dK and dV are summed over the group, and the bias's over what it is broadcast to, in fp32.
    """
    x = Inputs(q, k, v, sinks, dense, key_lengths, cu_q, cu_k, seed, mask, scale, softcap, dropout_p, bias, slopes)
    dtype = accumulation_dtype(q.dtype)
    d_q = torch.zeros_like(q, memory_format=torch.contiguous_format)
    d_k = torch.zeros_like(k, dtype=dtype, memory_format=torch.contiguous_format)
    d_v = torch.zeros_like(v, dtype=dtype, memory_format=torch.contiguous_format)
    d_sinks = q.new_zeros(0 if sinks is None else sinks.shape[0], dtype=dtype)
    d_bias = q.new_zeros(0 if bias is None or not wants_bias else bias.shape, dtype=dtype)
    with torch.autocast(q.device.type, enabled=False):
        for row in rows_of_tiles(x):
            tile = x.load(row)
            shape = tile.scores.shape[2:4]
            where = (slice(None), row.q_heads, row.queries)
            row_d_out = d_out[where].to(dtype).unflatten(1, (-1, shape[0]))
            row_d_lse = d_lse[where].to(dtype).unflatten(1, (-1, shape[0]))[..., None]
            if tile.sees is not None:
                row_d_out, row_d_lse = (t.masked_fill(~tile.sees, 0) for t in (row_d_out, row_d_lse))
            p, total, top = tile.exponentials()
            p = p.div_(total)
            flat_d_out = row_d_out.flatten(2, 3)
            x.add(d_v, row, x.drop(p, row).flatten(2, 3).mT @ flat_d_out)
            d_p = x.drop((flat_d_out @ tile.v.mT).unflatten(2, shape), row)
            # A row is whole here. The sum of dO * O is the same but rounded apart from dP, and where a query sees few
            # keys the two must cancel.
            delta = (p * d_p).sum(-1, keepdim=True) - row_d_lse
            d_scores = d_p.sub_(delta).mul_(p)
            if tile.sink is not None:
                d_sinks[row.q_heads] -= (torch.exp(tile.sink - top) / total * delta).sum((0, 3, 4)).flatten()
            if bias is not None and wants_bias:
                x.add_bias(d_bias, row, d_scores)
            if softcap:
                d_scores = d_scores * (1 - (tile.capped / softcap) ** 2)
            d_scores = d_scores.mul_(scale).flatten(2, 3)
            d_q[where] = (d_scores @ tile.k).unflatten(2, shape).flatten(1, 2).to(q.dtype)
            x.add(d_k, row, d_scores.mT @ tile.q)
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype), d_sinks, d_bias


@tiled_attention.register_fake
def _(q, k, v, *rest):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


@tiled_attention_backward.register_fake
def _(d_out, d_lse, q, k, v, sinks, *rest):  # type: ignore[no-untyped-def]
    bias, _, wants_bias = rest[9:] or (None, None, False)
    dtype = accumulation_dtype(q.dtype)
    d_sinks = q.new_empty(0 if sinks is None else sinks.shape[0], dtype=dtype)
    d_bias = q.new_empty(bias.shape if wants_bias else 0, dtype=dtype)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_sinks, d_bias


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:9], *inputs[13:])
    ctx.rest = inputs[9:13]


def _backward(ctx, d_out, d_lse):  # type: ignore[no-untyped-def]
    *inputs, bias, slopes = ctx.saved_tensors
    sinks, wants_bias = inputs[3], bias is not None and ctx.needs_input_grad[13]
    d_q, d_k, d_v, d_sinks, d_bias = tiled_attention_backward(
        d_out, d_lse, *inputs, *ctx.rest, bias, slopes, wants_bias
    )
    d_sinks = None if sinks is None else d_sinks.to(sinks.dtype)
    d_bias = d_bias.to(bias.dtype) if wants_bias else None
    return d_q, d_k, d_v, d_sinks, *([None] * 9), d_bias, None


tiled_attention.register_autograd(_backward, setup_context=_save)
