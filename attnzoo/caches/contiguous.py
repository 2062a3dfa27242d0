"""One preallocated block a row: the plain cache."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.caches.places import places
from attnzoo.caches.storage import Storage
from attnzoo.caches.token_cache import TokenCache


class ContiguousCache(TokenCache):
    """Keys `[B, Hk, max_length, D]` and values `[B, Hk, max_length, Dv]`, filled from the left.

    While all rows are equally long an append is one slice copy; nothing waits for the device.

    Args:
        batch_size: rows.
        num_kv_heads: heads of keys and values.
        max_length: tokens that each row has room for.
        head_dim: size of a key.
        v_head_dim: size of a value; None: `head_dim`; 0: there are no values.
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
        super().__init__(batch_size, num_kv_heads, max_length, head_dim, v_head_dim, dtype, device)
        self._k, self._v = self._storage(self.head_dim), self._storage(self.v_head_dim)

    def _storage(self, dim: int) -> Storage:
        return Storage(self.batch_size, self.num_kv_heads, self.max_length, dim, self.dtype, self.device)

    def _storages(self) -> tuple[Storage, ...]:
        return self._k, self._v

    def _write(self, k: Tensor, v: Tensor, counts: list[int] | None) -> None:
        if self.uniform:  # what lands past a row's end is dead, and the next append writes over it
            new = k.shape[2] if counts is None else max(counts)
            self._k.write_all(self.length, k[:, :, :new])
            self._v.write_all(self.length, v[:, :, :new])
            return
        at = places(self.lengths, k.shape[2], counts, self.batch_size, self.device)
        self._k.write(at.rows, at.positions, at.of(k))
        self._v.write(at.rows, at.positions, at.of(v))

    def _read(self) -> tuple[Tensor, Tensor]:
        return self._k.read_all(self.length), self._v.read_all(self.length)

    def _move(self, indices: Tensor, in_place: bool) -> None:
        for storage in (self._k, self._v):
            if in_place:
                storage.reorder(indices, self.length)
            else:
                storage.select(indices)
