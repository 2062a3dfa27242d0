"""Rotating what a layer has just projected: where its new tokens stand, in rows, documents and caches."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.caches import Cache
from attnzoo.layers.inputs import packed_positions
from attnzoo.layers.rope import RotaryEmbedding, apply_rotary


def rotate_new(
    rope: RotaryEmbedding,
    q: Tensor,
    k: Tensor,
    *,
    positions: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cache: Cache | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries `[B, Hq, S, D]` and keys `[B, Hk, S, D]` of the same new tokens, rotated.

    Unless `positions` are given, tokens stand at 0, 1, ... in each row and document, or on from what `cache` holds
    before they are appended. The other arguments are those of a layer's forward.
    """
    new = q.shape[2]
    places = torch.arange(new, device=q.device)
    lengths: Tensor | None = None  # tokens of each position's sequence, which dynamic scaling reads
    if cu_seqlens is not None:
        places, lengths = packed_positions(cu_seqlens, new)
    elif cache is not None:
        places = places + (cache.length if cache.uniform else cache.lengths[:, None])
    if key_lengths is not None:
        before = 0 if cache is None else cache.lengths
        lengths = (before + key_lengths)[:, None]
    if positions is not None:
        places, lengths = positions, None
    cos, sin = rope(places, lengths=lengths, dtype=torch.promote_types(q.dtype, torch.float32))
    return apply_rotary(q, cos, sin, rope.layout), apply_rotary(k, cos, sin, rope.layout)
