"""Hidden states of the calibration text, batch by batch: in memory, or in a file where they would fill it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import torch
from torch import Tensor

_PART_OF_MEMORY = 0.25  # of what is free; the rest is for the layers


class Activations:
    """One tensor `[rows, S, dim]` a batch, all in `dtype`; a batch may be replaced.

    Args:
        sizes: (rows, S) of each batch.
        dim, dtype: of every tensor.
        spill: folder for the file, if one is needed; the file has no name there once it is open.
    """

    def __init__(self, sizes: list[tuple[int, int]], dim: int, dtype: torch.dtype, spill: Path | None = None) -> None:
        counts = [rows * length * dim for rows, length in sizes]
        total = sum(counts)
        nbytes = total * dtype.itemsize
        if spill is not None and nbytes > _PART_OF_MEMORY * free_memory():
            path = spill / f"activations-{secrets.token_hex(4)}"
            flat = torch.from_file(str(path), shared=True, size=total, dtype=dtype)
            path.unlink()
        else:
            flat = torch.empty(total, dtype=dtype)
        self._parts = [part.view(*size, dim) for part, size in zip(flat.split(counts), sizes, strict=True)]

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, batch: int) -> Tensor:
        return self._parts[batch]

    def __setitem__(self, batch: int, value: Tensor) -> None:
        self._parts[batch].copy_(value)


def free_memory() -> int:
    """Bytes of memory that are free, as far as the system tells."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not every system has them
        return 1 << 62
