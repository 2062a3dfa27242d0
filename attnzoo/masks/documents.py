"""Packed documents that cannot see one another: the block-diagonal mask of `cu_seqlens`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnzoo.masks.base import Mask, Span


@dataclass(frozen=True)
class Documents(Mask):
    """Query i sees key j iff both lie in the same document. Positions past the last boundary see nothing.

    cu_seqlens [0, 1, 4]; with `& Causal()`:
    1 0 0 0      1 0 0 0
    0 1 1 1      0 1 0 0
    0 1 1 1      0 1 1 0
    0 1 1 1      0 1 1 1

    Args:
        cu_seqlens: the documents' boundaries, `[num_documents + 1]` integers that start at 0 and never fall; equal
            neighbours are empty documents. Held as a tuple, so a GPU tensor is read once, here.
    """

    pattern: ClassVar[str] = "documents"

    cu_seqlens: tuple[int, ...]

    def __init__(self, cu_seqlens: Tensor | Sequence[int]) -> None:
        values = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else [int(c) for c in cu_seqlens]
        if not isinstance(values, list) or len(values) < 2 or values[0] != 0 or sorted(values) != values:
            raise ValueError(f"cu_seqlens must be [0, ..., total] and never fall, got {cu_seqlens}")
        object.__setattr__(self, "cu_seqlens", tuple(values))
        super().__post_init__()

    def _document(self, position: Tensor) -> Tensor:
        """The document's number at each position; -1 before the first and after the last."""
        ends = torch.tensor(self.cu_seqlens[1:], device=position.device, dtype=position.dtype)
        number = torch.searchsorted(ends, position.contiguous(), right=True)
        return torch.where((position >= 0) & (position < self.cu_seqlens[-1]), number, -1)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        query, key = self._document(i), self._document(j)
        return (query == key) & (query >= 0)

    def tiles(self, i: Span, j: Span) -> tuple[Tensor, Tensor]:
        # Document numbers rise along a tile, so overlap is an overlap of intervals; positions outside are clamped in,
        # which can only claim too much.
        last = self.cu_seqlens[-1] - 1
        inside = (i.hi >= 0) & (i.lo <= last) & (j.lo <= last)
        q_first, q_last, k_first, k_last = (self._document(p.clamp(0, max(last, 0))) for p in (i.lo, i.hi, j.lo, j.hi))
        anything = inside & (q_first <= k_last) & (k_first <= q_last)
        whole = (i.lo >= 0) & (i.hi <= last) & (j.hi <= last)
        everything = whole & (q_first == q_last) & (k_first == k_last) & (q_first == k_first)
        return anything, everything


if __name__ == "__main__":
    from attnzoo.masks.causal import Causal
    from attnzoo.masks.drawing import main

    main(Documents([0, 12, 40, 64]) & Causal(), name="documents")
