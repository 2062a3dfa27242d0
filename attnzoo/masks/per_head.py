"""A mask of its own for each query head, as Longformer dilates only some of its heads (arXiv 2004.05150)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnzoo.masks.base import Mask, Span


@dataclass(frozen=True)
class PerHead(Mask):
    """Head h sees what `masks[h]` sees.

    Its tensors have the heads in their third dimension from the end: `dense` gives `[heads, q_len, k_len]`, and
    `visible` of `[B, 1, Sq, 1]` and `[Sk]` gives `[B, heads, Sq, Sk]`. Combine it with others by & and |.

    Args:
        masks: one a query head, none of them a mask of several heads itself.
    """

    pattern: ClassVar[str] = "per_head"

    masks: tuple[Mask, ...]

    def __init__(self, masks: Sequence[Mask]) -> None:
        masks = tuple(masks)
        if not masks or any(not isinstance(mask, Mask) or mask.heads is not None for mask in masks):
            raise ValueError(f"masks must be at least one mask, one a head and each of one head, got {masks}")
        object.__setattr__(self, "masks", masks)
        super().__post_init__()

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(i.shape, j.shape, (1, 1, 1))
        return torch.cat([mask.visible(i, j).expand(shape) for mask in self.masks], dim=-3)

    def tiles(self, i: Span, j: Span) -> tuple[Tensor, Tensor]:
        shape = torch.broadcast_shapes(i.lo.shape, j.lo.shape, (1, 1, 1))
        each = [mask.tiles(i, j) for mask in self.masks]
        anything, everything = (torch.cat([pair[k].expand(shape) for pair in each], dim=-3) for k in range(2))
        return anything, everything

    @property
    def causal(self) -> bool:
        return all(mask.causal for mask in self.masks)

    @property
    def heads(self) -> int | None:
        return len(self.masks)

    def head(self, number: int) -> Mask:
        return self.masks[number]


if __name__ == "__main__":
    from attnzoo.masks.dilated import Dilated
    from attnzoo.masks.drawing import main
    from attnzoo.masks.sliding_window import SlidingWindow

    main(PerHead((SlidingWindow(8), Dilated(8, 2), Dilated(8, 4), Dilated(8, 8))))
