"""Decoding as the textbook writes it, one row after another: what `decode` is held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo.masks import Mask
from attnzoo.ops.decoding.common import Call, check_last, numbers
from attnzoo.ops.decoding.reach import is_relative


def reasons(call: Call) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    whole = isinstance(call.shift, int) and call.shift == 0
    seen = whole or is_relative(call.mask, call.stored.prefix)
    return [] if seen else ["counts positions from the first key that is held"]


def run(call: Call) -> Tensor:
    """The result, `[B, Hq, Sq, Dv]`. Waits for the device."""
    batch, q_len = call.q.shape[0], call.q.shape[2]
    shifts, starts = (numbers(rows, batch) for rows in (call.shift, call.starts))
    lengths = [length - shift for length, shift in zip(call.cache.row_lengths(), shifts, strict=True)]
    starts = [start - shift for start, shift in zip(starts, shifts, strict=True)]
    for start, length in zip(starts, lengths, strict=True):
        check_last(start, q_len, length)
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    k, v = call.cache.view()
    return decode_reference(
        call.q, k, v, lengths, starts, mask=call.mask, scale=scale, softcap=call.softcap, sinks=call.sinks
    )


def decode_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    starts: Sequence[int],
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Row b: queries at positions `starts[b] + i` over the first `lengths[b]` keys; queries past the row's end give 0.

    Shapes as in `decode`, with `k [B, Hk, n, D]` and `v [B, Hk, n, Dv]`. Differentiable, right in fp64.
    """
    batch, q_heads, q_len, _ = q.shape
    k_heads, width = k.shape[1], v.shape[-1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = []
    for b in range(batch):
        keys = k[b, :, : lengths[b]].to(dtype)  # [Hk, n, D]
        values = v[b, :, : lengths[b]].to(dtype)
        i = starts[b] + torch.arange(q_len, device=q.device)[:, None]
        j = torch.arange(lengths[b], device=q.device)[None, :]
        visible = mask.visible(i, j) & (i < lengths[b])  # [Sq, n]
        heads = []
        for h in range(q_heads):
            at = h * k_heads // q_heads
            scores = q[b, h].to(dtype) @ keys[at].T * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = torch.where(visible, scores.exp(), 0)  # the plain formula: not for large scores
            total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks[h].to(dtype).exp())
            sees = visible.any(-1, keepdim=True)
            heads.append(torch.where(sees, weights / torch.where(sees, total, 1), 0) @ values[at])
        rows.append(torch.stack(heads) if heads else values.new_zeros(0, q_len, width))
    return torch.stack(rows).to(q.dtype)
