"""A few random blocks of keys for each block of queries (BigBird, arXiv 2007.14062)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from attnzoo.masks.base import Mask, Span, check_integer
from attnzoo.masks.cutting import chop_at_multiples

_Integers = TypeVar("_Integers", int, Tensor)


@dataclass(frozen=True)
class RandomBlocks(Mask):
    """Queries of block a see `per_row` whole blocks of keys, drawn for a; all there are where those are fewer.

    Without `length` the draws are among the blocks before a. Such a mask is causal, and the same for sequences of any
    length, so that decoding sees what the full pass saw. With `length` they are among all blocks of a sequence of that
    many tokens; in a shorter one those past its end are missing.

    The blocks that may be drawn are split into `per_row` equal stretches, with one drawn from each. Every draw is a
    hash of (seed, a, stretch): no table, and the same on every device.

    per_row 1, block 1:    per_row 1, block 1, length 4:
    0 0 0 0                0 0 0 1
    1 0 0 0                0 0 1 0
    0 1 0 0                0 0 0 1
    0 1 0 0                0 1 0 0

    Args:
        per_row: blocks drawn for each block of queries; at least 0.
        block: tokens in a block; at least 1.
        seed: of the draws, from 0; heads that shall differ need masks that differ (`PerHead`).
        length: tokens in the sequence, for a mask that is not causal; None: causal.
        near: blocks up to this far from a are not drawn; 0: all but a itself. Leaves out a window's blocks.
        edge: so many blocks at the start, and at the end given a length, are not drawn. Leaves out global blocks.
    """

    pattern: ClassVar[str] = "random_blocks"

    per_row: int
    block: int
    seed: int = 0
    length: int | None = None
    near: int = 0
    edge: int = 0

    def __post_init__(self) -> None:
        for name, least in (("per_row", 0), ("block", 1), ("seed", 0), ("near", 0), ("edge", 0)):
            check_integer(name, getattr(self, name), least)
        if self.length is not None:
            check_integer("length", self.length, 1)
        super().__post_init__()

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        rows, keys = i // self.block, j // self.block
        seen = torch.zeros(torch.broadcast_shapes(i.shape, j.shape), dtype=torch.bool, device=j.device)
        for stretch in range(self.per_row):
            seen = seen | (self.drawn(rows, stretch) == keys)
        return seen

    def tiles(self, i: Span, j: Span) -> tuple[Tensor, Tensor]:
        rows, last_row, keys, last_key = (p // self.block for p in (i.lo, i.hi, j.lo, j.hi))
        anything = torch.zeros(torch.broadcast_shapes(rows.shape, keys.shape), dtype=torch.bool, device=rows.device)
        deepest = int((last_row - rows).max()) + 1 if rows.numel() else 0
        for below in range(deepest):  # the blocks of queries in a tile, one after another
            row = torch.minimum(rows + below, last_row)
            for stretch in range(self.per_row):
                drawn = self.drawn(row, stretch)
                anything = anything | ((keys <= drawn) & (drawn <= last_key))
        return anything, anything & (rows == last_row) & (keys == last_key)

    def cut(self, positions: range) -> list[range]:
        return chop_at_multiples(positions, self.block)

    @property
    def causal(self) -> bool:
        return self.length is None

    def drawn(self, row: Tensor, stretch: int) -> Tensor:
        """The block drawn for each block of queries from one of the stretches; -1 if that stretch is empty."""
        row = row.long()
        if self.length is None:
            before, after = (row - self.near - self.edge).clamp(min=0), torch.zeros_like(row)
        else:
            blocks = -(-self.length // self.block)
            end = blocks - self.edge
            before = (row - self.near).clamp(max=end) - self.edge
            after = end - (row + self.near + 1).clamp(min=self.edge)
            exists = (row >= 0) & (row < blocks)
            before, after = (torch.where(exists, n.clamp(min=0), 0) for n in (before, after))
        there = before + after
        first = there * stretch // self.per_row
        size = there * (stretch + 1) // self.per_row - first
        pick = first + _hash(self.seed, row, stretch) % size.clamp(min=1)
        later = (row + self.near + 1).clamp(min=self.edge) + pick - before
        return torch.where(size > 0, torch.where(pick < before, pick + self.edge, later), -1)


def _hash(seed: int, row: Tensor, stretch: int) -> Tensor:
    """Integers in [0, 2^32) that look random, of int64 tensors."""
    return _mix(_mix(row ^ _mix(_mix(seed) ^ (seed >> 32))) ^ _mix(stretch + 0x9E3779B9))


def _mix(x: _Integers) -> _Integers:
    """A permutation of the 32-bit integers whose every output bit hangs on every input bit (C. Wellons, lowbias32)."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


if __name__ == "__main__":
    from attnzoo.masks.drawing import main

    main(RandomBlocks(2, 4, length=64))
