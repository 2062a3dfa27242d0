"""Decoding as the textbook writes it, one row after another: what `decode` is held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo.masks import Mask


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
