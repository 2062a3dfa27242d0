"""Each query sees the last `window` keys, its own among them (arXiv 2004.05150 and, in Mistral, 2310.06825)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnzoo.masks.base import Mask


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """Query i sees key j iff 0 <= i - j < window.

    window 2:
    1 0 0 0
    1 1 0 0
    0 1 1 0
    0 0 1 1

    Args:
        window: keys that a query sees, in tokens, itself included; at least 1.
    """

    pattern: ClassVar[str] = "sliding_window"

    window: int

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window must be an integer of at least 1, got {self.window!r}")
        super().__post_init__()

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < self.window)

    def tiles(self, i_lo: Tensor, i_hi: Tensor, j_lo: Tensor, j_hi: Tensor) -> tuple[Tensor, Tensor]:
        # Over a tile, i - j runs from i_lo - j_hi to i_hi - j_lo.
        anything = (j_lo <= i_hi) & (i_lo - j_hi < self.window)
        everything = (j_hi <= i_lo) & (i_hi - j_lo < self.window)
        return anything, everything


if __name__ == "__main__":
    from attnzoo.masks.drawing import main

    main(SlidingWindow(16))
