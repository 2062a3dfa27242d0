"""Rings: the newest tokens of each row, the oldest overwritten by the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnzoo.caches.lengths import RowLengths
from attnzoo.caches.places import places
from attnzoo.ops.decoding.stored import Stored, columns_of

if TYPE_CHECKING:
    from attnzoo.caches.storage import Storage


class Ring:
    """The last `min(kept, length)` tokens of each row, the token of position p in slot `p % size` of its row's block.

    `kept` starts as `size` and falls when tokens are cropped, since what they had overwritten is gone; what is appended
    afterwards fills it up again.

    Args:
        k: storage of the keys, a block a row.
        v: storage of the values, likewise.
        prefix: slots after the ring's that hold the row's first tokens, that of position p in slot `size + p`.
    """

    def __init__(self, k: Storage, v: Storage, prefix: int = 0) -> None:
        self.k, self.v, self.prefix = k, v, prefix
        batch, _, slots = k.parts[0].shape[:3]
        self.size = slots - prefix
        self.kept = RowLengths(batch, k.parts[0].device)
        self.reset()

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self.k.nbytes + self.v.nbytes

    def write(self, k: Tensor, v: Tensor, starts: int | Tensor, counts: list[int] | None) -> None:
        """Append `k [B, Hk, S, D]` and `v`, of which `counts` are real, to rows that hold `starts` tokens."""
        batch, new = k.shape[0], k.shape[2]
        at = places(starts, new, counts, batch, k.device, last=self.size)
        for storage, values in ((self.k, k), (self.v, v)):
            storage.write(at.rows, at.positions % self.size, at.of(values))
        if not (self.kept.uniform and self.kept.shortest == self.size):
            added = [new] * batch if counts is None else counts
            self.kept.set([min(row + more, self.size) for row, more in zip(self.kept.host(), added, strict=True)])

    def write_first(self, k: Tensor, v: Tensor, starts: int | Tensor, counts: list[int]) -> None:
        """Put the tokens of `k` and `v` that are among their rows' first ones, `counts` of each row, there as well."""
        at = places(starts, k.shape[2], counts, k.shape[0], k.device)
        for storage, values in ((self.k, k), (self.v, v)):
            storage.write(at.rows, self.size + at.positions, at.of(values))

    def read(self, starts: int | Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values of positions `starts[b], ..., starts[b] + count - 1`, `[B, Hk, count, D]`.

        For positions that are not held anything may stand there. The first columns are the prefix, wherever rows start.
        """
        device = self.k.parts[0].device
        rows = torch.arange(self.k.parts[0].shape[0], device=device).unsqueeze(1)
        base = starts.unsqueeze(1) if isinstance(starts, Tensor) else starts
        slots = (base + torch.arange(count, device=device).unsqueeze(0)) % self.size
        slots = columns_of(slots, self.size, self.prefix)
        return self.k.read(rows, slots), self.v.read(rows, slots)

    def stored(self, rows: RowLengths, dtype: torch.dtype) -> Stored:
        """Where the newest of `rows` tokens stand, for kernels."""
        k, v, kept = self.k.parts, self.v.parts, self.kept.rows()
        return Stored(k, v, dtype, rows.rows(), rows.longest, ring=True, kept=kept, prefix=self.prefix)

    def kept_after(self, before: list[int], after: list[int]) -> list[int]:
        """What `kept` would be if rows of `before` tokens were cropped to `after`."""
        kept = []
        for held, old, new in zip(self.kept.host(), before, after, strict=True):
            whole = old <= held or new == 0  # nothing of the row is missing, or nothing can be
            kept.append(self.size if whole else max(held - (old - new), 0))
        return kept

    def take(self, indices: Tensor, in_place: bool) -> None:
        """Row b becomes what row `indices[b]` was."""
        for storage in (self.k, self.v):
            if in_place:
                storage.reorder(indices, self.size + self.prefix)
            else:
                storage.select(indices)
        self.kept.take(indices)

    def reset(self) -> None:
        """Start again with empty rows."""
        self.kept.set([self.size] * self.k.parts[0].shape[0])
