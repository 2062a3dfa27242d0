"""What the decoding backends share: the cache as they see it, and the validated call."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from attnzoo.masks import Mask
from attnzoo.ops.decoding.stored import Stored


class KeyValues(Protocol):
    """What `decode` needs of a cache; every cache in `attnzoo.caches` has it, and `stored()` for kernels besides."""

    @property
    def length(self) -> int: ...

    @property
    def uniform(self) -> bool: ...

    @property
    def lengths(self) -> Tensor: ...

    def row_lengths(self) -> list[int]: ...

    @property
    def first(self) -> int | Tensor: ...

    @property
    def kept(self) -> int | None: ...

    def view(self) -> tuple[Tensor, Tensor]: ...


class Call(NamedTuple):
    """One call of `decode`, validated and with its defaults filled in; what backends judge and run."""

    q: Tensor  # [B, Hq, Sq, D]
    cache: KeyValues
    stored: Stored
    mask: Mask
    scale: float | None
    softcap: float | None
    sinks: Tensor | None  # [Hq]
    starts: int | Tensor  # positions of the first queries
    shift: int | Tensor  # position of the first key in `cache.view()`


def check_last(start: int, q_len: int, length: int) -> None:
    """ValueError unless `q_len` queries from position `start` on reach the end of a row of `length` tokens."""
    if not length - q_len <= start <= length:
        raise ValueError(
            f"starts holds {start}; {q_len} queries at the end of a row of {length} tokens "
            f"start from {length - q_len} to {length}"
        )


def numbers(rows: int | Tensor, batch: int) -> list[int]:
    """One number for all rows, or `[B]`, as a list; the latter waits for the device."""
    return rows.tolist() if isinstance(rows, Tensor) else [rows] * batch
