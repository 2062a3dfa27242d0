"""Masks made of masks: `a & b` and `a | b`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from attnzoo.masks.base import Mask, Span


@dataclass(frozen=True)
class _Pair(Mask):
    """What `And` and `Or` share."""

    first: Mask
    second: Mask

    def __post_init__(self) -> None:
        heads = {mask.heads for mask in (self.first, self.second) if mask.heads is not None}
        if len(heads) > 1:
            raise ValueError(f"masks combine for the same number of heads, got {sorted(heads)}")
        super().__post_init__()

    def cut(self, positions: range) -> list[range]:
        return [piece for part in self.first.cut(positions) for piece in self.second.cut(part)]

    @property
    def heads(self) -> int | None:
        return self.second.heads if self.first.heads is None else self.first.heads

    def head(self, number: int) -> Self:
        return self if self.heads is None else type(self)(self.first.head(number), self.second.head(number))


@dataclass(frozen=True)
class And(_Pair):
    """Sees what both masks see."""

    pattern: ClassVar[str] = "and"

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return self.first.visible(i, j) & self.second.visible(i, j)

    def tiles(self, i: Span, j: Span) -> tuple[Tensor, Tensor]:
        any_1, all_1 = self.first.tiles(i, j)
        any_2, all_2 = self.second.tiles(i, j)
        return any_1 & any_2, all_1 & all_2

    @property
    def causal(self) -> bool:
        return self.first.causal or self.second.causal

    def __str__(self) -> str:
        return " & ".join(f"({part})" if isinstance(part, Or) else str(part) for part in (self.first, self.second))


@dataclass(frozen=True)
class Or(_Pair):
    """Sees what either mask sees."""

    pattern: ClassVar[str] = "or"

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return self.first.visible(i, j) | self.second.visible(i, j)

    def tiles(self, i: Span, j: Span) -> tuple[Tensor, Tensor]:
        any_1, all_1 = self.first.tiles(i, j)
        any_2, all_2 = self.second.tiles(i, j)
        return any_1 | any_2, all_1 | all_2

    @property
    def causal(self) -> bool:
        return self.first.causal and self.second.causal

    def __str__(self) -> str:
        return f"{self.first} | {self.second}"
