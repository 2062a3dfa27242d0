"""No query sees a later key: language models. Aligned bottom right, so the last query sees every key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnzoo.masks.base import Mask, Span


@dataclass(frozen=True)
class Causal(Mask):
    """Query i sees key j iff j <= i.

    1 0 0 0
    1 1 0 0
    1 1 1 0
    1 1 1 1
    """

    pattern: ClassVar[str] = "causal"

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    def tiles(self, i: Span, j: Span) -> tuple[Tensor, Tensor]:
        return j.lo <= i.hi, j.hi <= i.lo

    @property
    def causal(self) -> bool:
        return True


if __name__ == "__main__":
    from attnzoo.masks.drawing import main

    main(Causal())
