"""Where the tokens of one append go."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """New tokens that are written: their rows and absolute positions, which broadcast against one another."""

    rows: Tensor  # [B, 1] or [T]
    positions: Tensor  # [B or 1, S] or [T]
    tokens: Tensor | slice  # which of the S tokens that came: all rows' alike, or [T]

    def of(self, new: Tensor) -> Tensor:
        """The tokens themselves, `[B, S, Hk, D]` or `[T, Hk, D]`, from `new [B, Hk, S, D]`."""
        if isinstance(self.tokens, slice):
            return new[:, :, self.tokens].transpose(1, 2)
        return new[self.rows, :, self.tokens]


def places(
    starts: int | Tensor, new: int, counts: list[int] | None, batch: int, device: torch.device, last: int | None = None
) -> Places:
    """Where the tokens of one append go, padding left out.

    Args:
        starts: tokens that the rows hold already, one number for all or `[B]`.
        new: S, tokens that came for each row.
        counts: how many of them are real, row by row; None: all.
        batch: B.
        device: of the result.
        last: leave out all but the last so many of each row's real tokens; None: keep all.
    """
    if counts is None:
        skip = 0 if last is None else max(new - last, 0)
        rows = torch.arange(batch, device=device).unsqueeze(1)
        base = starts.unsqueeze(1) if isinstance(starts, Tensor) else starts
        at = torch.arange(skip, new, device=device).unsqueeze(0)
        return Places(rows, base + at, slice(skip, new))
    skips = [0 if last is None else max(count - last, 0) for count in counts]
    real = torch.tensor([count - skip for count, skip in zip(counts, skips, strict=True)])
    rows = torch.arange(batch).repeat_interleave(real)
    before = real.cumsum(0) - real  # tokens of earlier rows
    tokens = torch.arange(len(rows)) - before[rows] + torch.tensor(skips)[rows]
    rows, tokens = rows.to(device), tokens.to(device)
    return Places(rows, tokens + (starts[rows] if isinstance(starts, Tensor) else starts), tokens)
