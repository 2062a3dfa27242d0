"""Latent decoding as the paper writes it, one row and head after another: what `latent_decode` is held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo.masks import Mask
from attnzoo.ops.decoding import is_relative, numbers
from attnzoo.ops.latent.common import Call


def reasons(call: Call) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    first = call.cache.first
    whole = isinstance(first, int) and first == 0
    return [] if whole or is_relative(call.mask) else ["counts positions from the first token that is held"]


def run(call: Call) -> Tensor:
    """The result, `[B, H, Sq, R]`. Waits for the device."""
    batch, cache = call.q_latent.shape[0], call.cache
    shifts = numbers(cache.first, batch)
    lengths = [length - shift for length, shift in zip(cache.row_lengths(), shifts, strict=True)]
    starts = [start - shift for start, shift in zip(numbers(call.starts, batch), shifts, strict=True)]
    queries = call.q_latent, call.q_rope
    return latent_decode_reference(*queries, *cache.view(), lengths, starts, scale=call.scale, mask=call.mask)


def latent_decode_reference(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    rope_key: Tensor,
    lengths: Sequence[int],
    starts: Sequence[int],
    *,
    scale: float,
    mask: Mask,
) -> Tensor:
    """Row b: queries at positions `starts[b] + i` over the first `lengths[b]` tokens; those past the row's end give 0.

    Shapes as in `latent_decode`, `latent [B, 1, n, R]` and `rope_key [B, 1, n, Dr]`. Differentiable, right in fp64.
    """
    dtype = torch.float64 if q_latent.dtype == torch.float64 else torch.float32
    rows = []
    for b, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        tokens, keys = latent[b, 0, :length].to(dtype), rope_key[b, 0, :length].to(dtype)  # [n, R], [n, Dr]
        i = start + torch.arange(q_latent.shape[2], device=q_latent.device)[:, None]
        visible = mask.visible(i, torch.arange(length, device=q_latent.device)) & (i < length)  # [Sq, n]
        heads = []
        for h in range(q_latent.shape[1]):
            scores = (q_latent[b, h].to(dtype) @ tokens.T + q_rope[b, h].to(dtype) @ keys.T) * scale
            weights = torch.where(visible, scores.exp(), 0)  # the plain formula: not for large scores
            total = weights.sum(-1, keepdim=True)
            heads.append(weights / torch.where(total == 0, 1, total) @ tokens)
        rows.append(torch.stack(heads))
    return torch.stack(rows).to(q_latent.dtype)
