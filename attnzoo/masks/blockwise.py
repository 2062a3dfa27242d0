"""A mask of blocks of tokens in place of tokens: BigBird's window (arXiv 2007.14062), causal blocks of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnzoo.masks.base import Mask, Span, check_integer
from attnzoo.masks.cutting import chop_at_multiples


@dataclass(frozen=True)
class Blockwise(Mask):
    """Query i sees key j iff `mask` lets block i // block see block j // block.

    mask Causal(), block 2:
    1 1 0 0
    1 1 0 0
    1 1 1 1
    1 1 1 1

    Args:
        mask: of blocks.
        block: tokens in a block; at least 1.
    """

    pattern: ClassVar[str] = "blockwise"

    mask: Mask
    block: int

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Mask):
            raise ValueError(f"mask must be one of attnzoo.masks, got {self.mask!r}")
        check_integer("block", self.block, 1)
        super().__post_init__()

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return self.mask.visible(i // self.block, j // self.block)

    def tiles(self, i: Span, j: Span) -> tuple[Tensor, Tensor]:
        return self.mask.tiles(self._blocks(i), self._blocks(j))

    def cut(self, positions: range) -> list[range]:
        return chop_at_multiples(positions, self.block)

    @property
    def heads(self) -> int | None:
        return self.mask.heads

    def head(self, number: int) -> Mask:
        return self if self.heads is None else Blockwise(self.mask.head(number), self.block)

    def _blocks(self, side: Span) -> Span:
        lo, hi = side.lo // self.block, side.hi // self.block
        return Span(lo, hi, torch.where(lo == hi, 0, 1))


if __name__ == "__main__":
    from attnzoo.masks.drawing import main
    from attnzoo.masks.sliding_window import SlidingWindow

    main(Blockwise(SlidingWindow(2, ahead=1), 8))
