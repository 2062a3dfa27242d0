"""One preallocated tensor each for keys and values: the plain cache."""

import torch
from torch import Tensor

from attnzoo.caches.base import Cache, host_lengths
from attnzoo.caches.lengths import RowLengths


class ContiguousCache(Cache):
    """Keys `[B, Hk, max_length, D]` and values `[B, Hk, max_length, Dv]`, filled from the left.

    While all rows are equally long an append is one slice copy; nothing waits for the device.

    Args:
        batch_size: rows.
        num_kv_heads: heads of keys and values.
        max_length: tokens that each row has room for.
        head_dim: size of a key.
        v_head_dim: size of a value; None: `head_dim`.
        dtype: of keys and values.
        device: of keys and values.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.batch_size, self.num_kv_heads, self.max_length = batch_size, num_kv_heads, max_length
        self.head_dim, self.v_head_dim = head_dim, head_dim if v_head_dim is None else v_head_dim
        for name in ("batch_size", "num_kv_heads", "max_length", "head_dim", "v_head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        shape = (batch_size, num_kv_heads, max_length)
        self._k = torch.zeros(*shape, self.head_dim, dtype=dtype, device=device)
        self._v = torch.zeros(*shape, self.v_head_dim, dtype=dtype, device=device)
        self._rows = RowLengths(batch_size, self._k.device)

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
    def dtype(self) -> torch.dtype:
        return self._k.dtype

    @property
    def device(self) -> torch.device:
        return self._k.device

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
        self._check_new(k, v)
        new = k.shape[2]
        counts = None if lengths is None else host_lengths(lengths, self.batch_size, new)
        if counts is None:
            self._check_room(self.length + new, new)
            self._write_all(k.detach(), v.detach())
            self._rows.add(new)
        else:
            ends = [row + count for row, count in zip(self.row_lengths(), counts, strict=True)]
            self._check_room(max(ends), new)
            self._write_some(k.detach(), v.detach(), counts)
            self._rows.set(ends)

    def view(self) -> tuple[Tensor, Tensor]:
        return self._k[:, :, : self.length], self._v[:, :, : self.length]

    def crop(self, length: int) -> None:
        if length < 0:
            raise ValueError(f"length is {length}; it must be at least 0")
        self._rows.set([min(row, length) for row in self.row_lengths()])

    def reorder(self, indices: Tensor) -> None:
        if indices.shape != (self.batch_size,):
            raise ValueError(f"indices has shape {list(indices.shape)}; it must be [{self.batch_size}]")
        self._check_indices(indices)
        for live in self.view():
            live.copy_(live.index_select(0, indices))
        self._take_lengths(indices)

    def select(self, indices: Tensor) -> None:
        self._check_indices(indices)
        self._k, self._v = self._k.index_select(0, indices), self._v.index_select(0, indices)
        self.batch_size = len(indices)
        self._take_lengths(indices)

    def repeat(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"count is {count}; it must be at least 1")
        self.select(torch.arange(self.batch_size, device=self.device).repeat_interleave(count))

    def reset(self) -> None:
        self._rows.set([0] * self.batch_size)

    def _write_all(self, k: Tensor, v: Tensor) -> None:
        new = k.shape[2]
        if self.uniform:
            start = self.length
            self._k[:, :, start : start + new] = k
            self._v[:, :, start : start + new] = v
        else:
            rows = torch.arange(self.batch_size, device=self.device).unsqueeze(1)  # [B, 1]
            places = self.lengths.unsqueeze(1) + torch.arange(new, device=self.device)  # [B, S]
            self._k[rows, :, places] = k.transpose(1, 2)
            self._v[rows, :, places] = v.transpose(1, 2)

    def _write_some(self, k: Tensor, v: Tensor, counts: list[int]) -> None:
        if self.uniform:  # what lands past a row's end is dead, and the next append writes over it
            self._write_all(k[:, :, : max(counts)], v[:, :, : max(counts)])
            return
        for row, (start, count) in enumerate(zip(self.row_lengths(), counts, strict=True)):
            self._k[row, :, start : start + count] = k[row, :, :count]
            self._v[row, :, start : start + count] = v[row, :, :count]

    def _take_lengths(self, indices: Tensor) -> None:
        if self.uniform:
            self._rows.set([self.length] * self.batch_size)
        else:
            before = self.row_lengths()
            self._rows.set([before[index] for index in indices.tolist()])

    def _check_new(self, k: Tensor, v: Tensor) -> None:
        for name, given, size in (("k", k, self.head_dim), ("v", v, self.v_head_dim)):
            new = k.shape[2] if k.dim() == 4 else -1
            allowed = (self.batch_size, self.num_kv_heads, new, size)
            if tuple(given.shape) != allowed:
                expected = f"[{self.batch_size}, {self.num_kv_heads}, S, {size}]"
                raise ValueError(f"{name} has shape {list(given.shape)}; this cache takes {expected}")
            if given.dtype != self.dtype or given.device != self.device:
                raise ValueError(
                    f"{name} is {given.dtype} on {given.device}; this cache is {self.dtype} on {self.device}"
                )

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
