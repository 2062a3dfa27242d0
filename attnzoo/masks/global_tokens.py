"""A few tokens that see everything and that everything sees (Longformer, arXiv 2004.05150; BigBird, 2007.14062)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnzoo.masks.base import Mask, Span, check_integer
from attnzoo.masks.cutting import chop_before

FEW = 8  # bounds that are compared one by one


@dataclass(frozen=True)
class GlobalTokens(Mask):
    """Query i sees key j iff one of them is a global token.

    tokens 1:    tokens (0, 2):    tokens 1, & Causal():
    1 1 1 1      1 1 1 1           1 0 0 0
    1 0 0 0      1 0 1 0           1 0 0 0
    1 0 0 0      1 1 1 1           1 0 0 0
    1 0 0 0      1 0 1 0           1 0 0 0

    Args:
        tokens: how many of the first tokens are global, or the positions of those that are, at least 0 each. Held as
            a number or as an ascending tuple, so a GPU tensor is read once, here.
    """

    pattern: ClassVar[str] = "global_tokens"

    tokens: int | tuple[int, ...]

    def __init__(self, tokens: int | Sequence[int] | Tensor) -> None:
        if isinstance(tokens, int):
            check_integer("tokens", tokens, 0)
            object.__setattr__(self, "tokens", tokens)
        else:
            values = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
            for value in values:
                check_integer("each index of tokens", value, 0)
            indices = tuple(sorted(set(values)))
            first = len(indices) if indices == tuple(range(len(indices))) else None
            object.__setattr__(self, "tokens", indices if first is None else first)
        super().__post_init__()

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return self._bounds_up_to(i) % 2 + self._bounds_up_to(j) % 2 > 0

    def tiles(self, i: Span, j: Span) -> tuple[Tensor, Tensor]:
        any_i, all_i = self._globals_in(i)
        any_j, all_j = self._globals_in(j)
        return any_i | any_j, all_i | all_j

    def cut(self, positions: range) -> list[range]:
        return chop_before(positions, self._bounds())

    def __str__(self) -> str:
        bounds = self._bounds()
        runs = (f"{a}" if b - a == 1 else f"{a}..{b - 1}" for a, b in zip(bounds[::2], bounds[1::2], strict=True))
        return f"GlobalTokens({', '.join(runs)})"

    def _globals_in(self, side: Span) -> tuple[Tensor, Tensor]:
        """Whether any, and whether all, of the positions from lo to hi are global."""
        before, after = self._bounds_up_to(side.lo), self._bounds_up_to(side.hi)
        return (before % 2 == 1) | (before != after), (before % 2 == 1) & (before == after)

    def _bounds_up_to(self, position: Tensor) -> Tensor:
        """How many bounds lie at or before each position; odd for a global token."""
        bounds = self._bounds()
        if len(bounds) <= FEW:  # without a tensor from the host, which no CUDA graph can hold
            return sum(((position >= bound).long() for bound in bounds), torch.zeros_like(position, dtype=torch.long))
        held = torch.tensor(bounds, device=position.device, dtype=position.dtype)
        return torch.searchsorted(held, position.contiguous(), right=True)

    def _bounds(self) -> list[int]:
        """Start and end of every stretch of global tokens, ascending."""
        if isinstance(self.tokens, int):
            return [0, self.tokens] if self.tokens else []
        held = set(self.tokens)
        starts = [token for token in self.tokens if token - 1 not in held]
        ends = [token + 1 for token in self.tokens if token + 1 not in held]
        return [bound for stretch in zip(starts, ends, strict=True) for bound in stretch]


if __name__ == "__main__":
    from attnzoo.masks.drawing import main

    main(GlobalTokens((0, 1, 2, 3, 30, 47)))
