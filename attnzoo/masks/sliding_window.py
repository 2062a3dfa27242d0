"""Each query sees the last `window` keys, its own among them (Longformer, arXiv 2004.05150; Mistral, 2310.06825)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnzoo.masks.base import Mask, Span, check_integer
from attnzoo.masks.cutting import chop


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """Query i sees key j iff -ahead <= i - j < window.

    window 2:    window 2, ahead 1:
    1 0 0 0      1 1 0 0
    1 1 0 0      1 1 1 0
    0 1 1 0      0 1 1 1
    0 0 1 1      0 0 1 1

    Args:
        window: keys that a query sees up to its own, itself included, in tokens; at least 1.
        ahead: keys that it sees after its own; 0: causal.
    """

    pattern: ClassVar[str] = "sliding_window"

    window: int
    ahead: int = 0

    def __post_init__(self) -> None:
        check_integer("window", self.window, 1)
        check_integer("ahead", self.ahead, 0)
        super().__post_init__()

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i + self.ahead) & (i - j < self.window)

    def tiles(self, i: Span, j: Span) -> tuple[Tensor, Tensor]:
        # Over a tile, i - j runs from i.lo - j.hi to i.hi - j.lo.
        anything = (j.lo <= i.hi + self.ahead) & (i.lo - j.hi < self.window)
        everything = (j.hi <= i.lo + self.ahead) & (i.hi - j.lo < self.window)
        return anything, everything

    def cut(self, positions: range) -> list[range]:
        return chop(positions, max(32, self.window + self.ahead))  # smaller rows cost more time than they save

    @property
    def causal(self) -> bool:
        return self.ahead == 0


if __name__ == "__main__":
    from attnzoo.masks.drawing import main

    main(SlidingWindow(16))
