"""A sliding window with gaps: every `dilation`-th key (arXiv 1904.10509; Longformer, 2004.05150)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnzoo.masks.base import Mask, Span, check_integer
from attnzoo.masks.cutting import chop


@dataclass(frozen=True)
class Dilated(Mask):
    """Query i sees key j iff i - j = s * dilation for a whole s with -ahead <= s < window.

    window 2, dilation 2:    window 2, dilation 2, ahead 1:
    1 0 0 0 0                1 0 1 0 0
    0 1 0 0 0                0 1 0 1 0
    1 0 1 0 0                1 0 1 0 1
    0 1 0 1 0                0 1 0 1 0
    0 0 1 0 1                0 0 1 0 1

    Queries see only keys of their own residue class modulo the dilation, so that each class is a sequence of its own
    with a `SlidingWindow(window, ahead)`. With dilation 1 the whole is that window.

    Args:
        window: keys that a query sees up to its own, itself included; at least 1.
        dilation: distance between neighbours among them, in tokens; at least 1.
        ahead: keys that it sees after its own; 0: causal.
    """

    pattern: ClassVar[str] = "dilated"

    window: int
    dilation: int
    ahead: int = 0

    def __post_init__(self) -> None:
        check_integer("window", self.window, 1)
        check_integer("dilation", self.dilation, 1)
        check_integer("ahead", self.ahead, 0)
        super().__post_init__()

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        distance = i - j
        near = (distance >= -self.ahead * self.dilation) & (distance < self.window * self.dilation)
        return near & (distance % self.dilation == 0)

    def tiles(self, i: Span, j: Span) -> tuple[Tensor, Tensor]:
        first, last = -self.ahead * self.dilation, (self.window - 1) * self.dilation
        least, most = i.lo - j.hi, i.hi - j.lo
        # All distances in a tile are alike modulo what its steps and the dilation have in common.
        alike = torch.gcd(self._alike(i.step), self._alike(j.step))
        fits = least % alike == 0
        seen_last = most.clamp(max=last) // self.dilation * self.dilation
        anything = fits & (seen_last >= least.clamp(min=first))
        everything = fits & (alike == self.dilation) & (least >= first) & (most <= last)
        return anything, everything

    def cut(self, positions: range) -> list[range]:
        size = max(32, self.window + self.ahead)
        if len(positions) < 16 * self.dilation:  # classes so small that neighbours share a tile at less cost
            return chop(positions, size)
        return [piece for first in range(self.dilation) for piece in chop(positions[first :: self.dilation], size)]

    @property
    def causal(self) -> bool:
        return self.ahead == 0

    def _alike(self, step: Tensor) -> Tensor:
        """Modulo what the positions of each span are alike; a side at a time, which are far fewer than the tiles."""
        return torch.gcd(step, torch.full_like(step, self.dilation))


if __name__ == "__main__":
    from attnzoo.masks.drawing import main

    main(Dilated(6, 3))
