"""Every query sees every key: encoders, cross-attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnzoo.masks.base import Mask, Span


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    pattern: ClassVar[str] = "full"

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return torch.ones(torch.broadcast_shapes(i.shape, j.shape), dtype=torch.bool, device=j.device)

    def tiles(self, i: Span, j: Span) -> tuple[Tensor, Tensor]:
        every = self.visible(i.lo, j.lo)
        return every, every


if __name__ == "__main__":
    from attnzoo.masks.drawing import main

    main(Full())
