"""Where a cache keeps its vectors, for kernels that read them in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from attnzoo.ops.decoding.common import KeyValues


class Rows(NamedTuple):
    """A number for each row of a batch, `base + more[b]`: what all rows share is known without asking the device."""

    base: int
    more: Tensor | None = None  # [B] integers on the device; None: zeros


class Stored(NamedTuple):
    """Keys and values as a cache holds them: nothing is gathered, converted or copied to make this.

    A tensor of vectors is `[blocks, Hk, size, D]`, its last stride 1. Row b's token p stands in slot `p` of block b;
    with a table in slot `p % size` of block `table[b, p // size]`; in a ring in slot `p % size` of block b.

    In int8 a vector is `codes * scale`, or `codes * scale + offset`, with fp32 scales and offsets
    `[blocks, Hk, size, 1]`.
    """

    k: tuple[Tensor, ...]  # (vectors,), (codes, scale) or (codes, scale, offset)
    v: tuple[Tensor, ...]  # likewise
    dtype: torch.dtype  # of what was appended
    lengths: Rows  # tokens of each row
    longest: int  # no row has more; sizes the launch
    table: Tensor | None = None  # [B, pages] int32
    ring: bool = False
    kept: Rows | None = None  # of the ring, or of the recent one: it holds the last `min(kept, length)` tokens
    recent: Stored | None = None  # a ring of the newest tokens as they came; they are read from there
    origin: int | Tensor = 0  # position of the token in slot 0, one for all rows or `[B]`
    prefix: int = 0  # first tokens that are never dropped: in a ring those of position p in slot `size + p` besides

    @property
    def batch(self) -> int:
        return self.k[0].shape[0] if self.table is None else self.table.shape[0]

    @property
    def heads(self) -> int:
        return self.k[0].shape[1]

    @property
    def size(self) -> int:
        """Slots of a block, those of the prefix beside a ring aside."""
        return self.k[0].shape[2] - (self.prefix if self.ring else 0)


def columns_of(slots: Tensor, size: int, prefix: int) -> Tensor:
    """Slots `[.., n]` of a view's columns over a ring of `size` slots: its first ones are those of the prefix."""
    if not prefix:
        return slots
    column = torch.arange(slots.shape[-1], device=slots.device)
    return torch.where(column < prefix, size + column, slots)


def stored(cache: KeyValues) -> Stored:
    """The cache's own `stored()`, or its view if it has none."""
    if hasattr(cache, "stored"):
        return cache.stored()
    k, v = cache.view()
    first = cache.first
    if cache.uniform and isinstance(first, int):
        lengths = Rows(cache.length - first)
    else:
        lengths = Rows(0, cache.lengths - first)
    return Stored((k,), (v,), k.dtype, lengths, k.shape[2], origin=first, prefix=getattr(cache, "prefix", 0))
