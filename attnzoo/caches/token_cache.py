"""What the caches that hold a key and a value for each token have in common."""

from __future__ import annotations

import sys
from abc import abstractmethod

import torch
from torch import Tensor

from attnzoo.caches.base import Cache, host_lengths
from attnzoo.caches.lengths import RowLengths
from attnzoo.caches.ring import Ring
from attnzoo.caches.storage import Storage
from attnzoo.ops.decoding.stored import Stored


class TokenCache(Cache):
    """Counts and checks; a subclass decides where tokens stand, and its storages in what form.

    Where that form loses something, the newest tokens can be held once more as they came (`_hold_recent`).
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        v_head_dim: int | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        self.batch_size, self.num_kv_heads, self.max_length = batch_size, num_kv_heads, max_length
        self.head_dim, self.v_head_dim = head_dim, head_dim if v_head_dim is None else v_head_dim
        for name in ("batch_size", "num_kv_heads", "max_length", "head_dim"):
            check_least(name, getattr(self, name), 1)
        check_least("v_head_dim", self.v_head_dim, 0)
        probe = torch.empty(0, dtype=dtype, device=device)  # what None stands for is PyTorch's to say
        self.dtype, self.device = probe.dtype, probe.device
        self._rows = RowLengths(batch_size, self.device)
        self._recent: Ring | None = None

    @property
    def length(self) -> int:
        return self._rows.longest

    @property
    def uniform(self) -> bool:
        return self._rows.uniform

    @property
    def lengths(self) -> Tensor:
        return self._rows.tensor()

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, whether filled or not."""
        recent = 0 if self._recent is None else self._recent.nbytes
        return sum(storage.nbytes for storage in self._storages()) + recent

    @property
    def bytes_per_token(self) -> int:
        """Bytes that room for one more token of one row takes."""
        return sum(storage.bytes_per_slot for storage in self._storages())

    def row_lengths(self) -> list[int]:
        return self._rows.host()

    def append(self, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> None:
        """Add S tokens after each row's last.

        Args:
            k: `[B, Hk, S, D]` of the cache's dtype and device.
            v: `[B, Hk, S, Dv]`, likewise.
            lengths: `[B]` int64 or int32, how many of the S tokens are real (right padding); None: all.
                Reading it waits for the device.

        Raises:
            ValueError: for another shape, dtype or device than the cache's, lengths out of range, or more tokens than
                there is room for. Nothing has been written then.
        """
        counts = self._check_new(k, v, lengths)
        new = k.shape[2]
        if counts is None:
            self._check_room(self.length + new, new)
        else:
            ends = [row + count for row, count in zip(self.row_lengths(), counts, strict=True)]
            self._check_room(max(ends), new)
        k, v = k.detach(), v.detach()
        self._write(k, v, counts)
        if self._recent is not None:
            self._recent.write(k, v, self._rows.value(), counts)
        if counts is None:
            self._rows.add(new)
        else:
            self._rows.set(ends)

    def view(self) -> tuple[Tensor, Tensor]:
        k, v = self._read()
        return (k, v) if self._recent is None else self._with_recent(k, v, self._recent)

    def stored(self) -> Stored:
        """Where keys and values stand, for kernels that read them in place; nothing is copied or computed."""
        k, v = self._storages()
        return self._stored(k.parts, v.parts)

    def _stored(self, k: tuple[Tensor, ...], v: tuple[Tensor, ...], table: Tensor | None = None) -> Stored:
        recent = None if self._recent is None else self._recent.stored(self._rows, self.dtype)
        kept = None if recent is None else recent.kept
        return Stored(k, v, self.dtype, self._rows.rows(), self.length, table, kept=kept, recent=recent)

    def crop(self, length: int | Tensor) -> None:
        """Keep at most the first `length` tokens of each row; `[B]` integers: `length[b]` of row b."""
        if isinstance(length, Tensor):
            limits = host_lengths(length, self.batch_size, sys.maxsize, "length")
        else:
            check_least("length", length, 0)
            limits = [length] * self.batch_size
        self._crop([min(row, limit) for row, limit in zip(self.row_lengths(), limits, strict=True)])

    def reorder(self, indices: Tensor) -> None:
        if indices.shape != (self.batch_size,):
            raise ValueError(f"indices has shape {list(indices.shape)}; it must be [{self.batch_size}]")
        self._take(indices, in_place=True)

    def select(self, indices: Tensor) -> None:
        self._take(indices, in_place=False)

    def repeat(self, count: int) -> None:
        check_least("count", count, 1)
        self.select(torch.arange(self.batch_size, device=self.device).repeat_interleave(count))

    def reset(self) -> None:
        self._crop([0] * self.batch_size)

    @abstractmethod
    def _storages(self) -> tuple[Storage, ...]:
        """All memory for tokens, but for the recent ones that are held twice."""

    @abstractmethod
    def _write(self, k: Tensor, v: Tensor, counts: list[int] | None) -> None:
        """Put new tokens after the rows' last; the lengths are still those before."""

    @abstractmethod
    def _read(self) -> tuple[Tensor, Tensor]:
        """The view, out of the storages; a copy if there are recent tokens held beside them."""

    @abstractmethod
    def _move(self, indices: Tensor, in_place: bool) -> None:
        """Row b becomes what row `indices[b]` was; the lengths and the batch size are still those before."""

    def _shrink(self, ends: list[int]) -> None:
        """Make the rows end at `ends`; the lengths are still those before. Raises before anything has changed."""

    def _crop(self, ends: list[int]) -> None:
        self._shrink(ends)
        if self._recent is not None:
            self._recent.kept.set(self._recent.kept_after(self.row_lengths(), ends))
        self._rows.set(ends)

    def _take(self, indices: Tensor, in_place: bool) -> None:
        self._check_indices(indices)
        self._move(indices, in_place)
        if self._recent is not None:
            self._recent.take(indices, in_place)
        self._rows.take(indices)
        self.batch_size = len(indices)

    def _hold_recent(self, count: int) -> None:
        """Hold the newest `count` tokens of each row once more, as they come."""
        if count:
            sizes = (self.head_dim, self.v_head_dim)
            k, v = (Storage(self.batch_size, self.num_kv_heads, count, n, self.dtype, self.device) for n in sizes)
            self._recent = Ring(k, v)

    def _with_recent(self, k: Tensor, v: Tensor, recent: Ring) -> tuple[Tensor, Tensor]:
        """The newest tokens laid over `k` and `v [B, Hk, n, ...]`, which are written to."""
        count = min(recent.size, k.shape[2])
        if count == 0:
            return k, v
        first = self._rows.value() - count
        fresh = recent.read(first, count)
        if isinstance(first, int) and recent.kept.uniform:
            count = min(recent.kept.shortest, count)
            for whole, new in zip((k, v), fresh, strict=True):
                whole[:, :, k.shape[2] - count :] = new[:, :, new.shape[2] - count :]
            return k, v
        # Where a token is not held any more, what is written is what stood there. Rows that are shorter than `count`
        # begin before position 0: modulo n that is dead memory behind their end, and no place comes twice.
        rows = torch.arange(self.batch_size, device=self.device).unsqueeze(1)
        column = torch.arange(count, device=self.device)
        position = (first.unsqueeze(1) if isinstance(first, Tensor) else first) + column.unsqueeze(0)  # [B or 1, count]
        held = column >= count - recent.kept.tensor().unsqueeze(1)  # [B, count]
        place = position % k.shape[2]
        for whole, new in zip((k, v), fresh, strict=True):
            old = whole[rows, :, place]  # [B, count, Hk, D]
            whole[rows, :, place] = torch.where(held[:, :, None, None], new.transpose(1, 2), old)
        return k, v

    def _check_new(self, k: Tensor, v: Tensor, lengths: Tensor | None) -> list[int] | None:
        """How many of the new tokens are real, row by row (None: all), or a ValueError."""
        new = k.shape[2] if k.dim() == 4 else -1
        for name, given, size in (("k", k, self.head_dim), ("v", v, self.v_head_dim)):
            allowed = (self.batch_size, self.num_kv_heads, new, size)
            if tuple(given.shape) != allowed:
                expected = f"[{self.batch_size}, {self.num_kv_heads}, S, {size}]"
                raise ValueError(f"{name} has shape {list(given.shape)}; this cache takes {expected}")
            if given.dtype != self.dtype or given.device != self.device:
                raise ValueError(
                    f"{name} is {given.dtype} on {given.device}; this cache is {self.dtype} on {self.device}"
                )
        return None if lengths is None else host_lengths(lengths, self.batch_size, new)

    def _check_room(self, end: int, new: int) -> None:
        if end > self.max_length:
            raise ValueError(
                f"cache full: it holds {self.length} tokens of max_length {self.max_length}, and {new} more came"
            )

    def _check_indices(self, indices: Tensor) -> None:
        if indices.dim() != 1 or len(indices) == 0 or indices.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"indices is {indices.dtype} of shape {list(indices.shape)}; it must be row numbers, int64 or int32"
            )
        if indices.device.type == "cpu" and not 0 <= int(indices.min()) <= int(indices.max()) < self.batch_size:
            raise ValueError(f"indices is {indices.tolist()}; each must be from 0 to {self.batch_size - 1}")


def check_least(name: str, value: int, least: int) -> None:
    """ValueError, naming the argument, for a number below `least`."""
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
