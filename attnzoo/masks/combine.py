"""Masks made of masks: `a & b` and `a | b`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnzoo.masks.base import Mask


@dataclass(frozen=True)
class And(Mask):
    """Sees what both masks see."""

    pattern: ClassVar[str] = "and"

    first: Mask
    second: Mask

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return self.first.visible(i, j) & self.second.visible(i, j)

    def tiles(self, i_lo: Tensor, i_hi: Tensor, j_lo: Tensor, j_hi: Tensor) -> tuple[Tensor, Tensor]:
        any_1, all_1 = self.first.tiles(i_lo, i_hi, j_lo, j_hi)
        any_2, all_2 = self.second.tiles(i_lo, i_hi, j_lo, j_hi)
        return any_1 & any_2, all_1 & all_2


@dataclass(frozen=True)
class Or(Mask):
    """Sees what either mask sees."""

    pattern: ClassVar[str] = "or"

    first: Mask
    second: Mask

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return self.first.visible(i, j) | self.second.visible(i, j)

    def tiles(self, i_lo: Tensor, i_hi: Tensor, j_lo: Tensor, j_hi: Tensor) -> tuple[Tensor, Tensor]:
        any_1, all_1 = self.first.tiles(i_lo, i_hi, j_lo, j_hi)
        any_2, all_2 = self.second.tiles(i_lo, i_hi, j_lo, j_hi)
        return any_1 | any_2, all_1 | all_2
