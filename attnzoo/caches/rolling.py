"""The newest tokens only, in a ring: for attention in a sliding window, at constant memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.caches.contiguous import ContiguousCache
from attnzoo.caches.lengths import RowLengths
from attnzoo.caches.ring import Ring
from attnzoo.caches.storage import Storage
from attnzoo.caches.token_cache import TokenCache, check_least
from attnzoo.ops.decoding import KeyValues, Stored


class RollingCache(TokenCache):
    """Keys `[B, Hk, window + margin, D]` and values, the token of position p in slot `p % (window + margin)`.

    It takes any number of tokens and goes on holding the last `window + margin` of each row. Positions count all tokens
    that were appended, and `first` tells where the view begins.

    Queries of a chunk that is longer than `margin + 1` see keys that this cache does not go on holding: attend to what
    `extend` returns, which for such a chunk is the window before it and the chunk. Layers do.

    With a `prefix` it holds the first tokens of each row besides, for masks that show them to every query
    (`SlidingWindow(w) | GlobalTokens(n) & Causal()`, arXiv 2309.17453); its view begins with them.

    Args:
        batch_size: rows.
        num_kv_heads: heads of keys and values.
        window: keys that a query may see, its own included, in tokens.
        head_dim: size of a key.
        v_head_dim: size of a value; None: `head_dim`.
        margin: tokens that are held beyond the window, so that as many can be cropped again (speculative decoding).
        prefix: first tokens of each row that are held as well.
        dtype: of keys and values.
        device: of keys and values.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        window: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        margin: int = 0,
        prefix: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_least("window", window, 1)
        check_least("margin", margin, 0)
        check_least("prefix", prefix, 0)
        super().__init__(batch_size, num_kv_heads, sys.maxsize, head_dim, v_head_dim, dtype, device)
        self.window, self.margin, self.prefix, self.reach = window, margin, prefix, window
        sizes, slots = (self.head_dim, self.v_head_dim), window + margin + prefix
        k, v = (Storage(batch_size, num_kv_heads, slots, n, self.dtype, self.device) for n in sizes)
        self._ring = Ring(k, v, prefix)

    @property
    def first(self) -> int | Tensor:
        gap = self._rows.value() - self._ring.kept.value() - self.prefix
        return gap.clamp(min=0) if isinstance(gap, Tensor) else max(gap, 0)

    @property
    def kept(self) -> int:
        return self._ring.kept.shortest

    def extend(self, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> KeyValues:
        """Append, and give what queries of these tokens attend to.

        Returns:
            the cache itself if it holds all that they may see (S is at most `margin + 1`, and what was cropped is made
            up for), else the window before and the S tokens, in memory that lives as long as it is referred to.
        """
        counts = self._check_new(k, v, lengths)
        new = k.shape[2]
        added = [new] * self.batch_size if counts is None else counts
        if self.window + new - 1 <= min(self.kept + min(added), self._ring.size):
            self.append(k, v, lengths)
            return self
        first, before = self.first, self.row_lengths()
        keys, values = k.detach()[:, :, : max(added)], v.detach()[:, :, : max(added)]
        if self.length > 0:
            held = [min(row, kept + self.prefix) for row, kept in zip(before, self._ring.kept.host(), strict=True)]
            both = ContiguousCache(
                self.batch_size,
                self.num_kv_heads,
                max(held) + new,
                self.head_dim,
                self.v_head_dim,
                dtype=self.dtype,
                device=self.device,
            )
            both.append(*self.view(), None if len(set(held)) == 1 else torch.tensor(held))
            both.append(keys, values, lengths)
            keys, values = both.view()
        self.append(k, v, lengths)
        rows = RowLengths(self.batch_size, self.device)
        rows.set([row + count for row, count in zip(before, added, strict=True)])
        return _Seen(keys, values, rows, first, self.window + new - 1, self.prefix)

    def crop(self, length: int | Tensor) -> None:
        """Keep at most the first `length` tokens of each row; `[B]` integers: `length[b]` of row b.

        Raises:
            ValueError: for a row that has dropped tokens and would be left with less than `window`: `margin` tokens can
                be cropped, and again as many as have been appended since; or all, with `length` 0. Nothing has changed
                then.
        """
        super().crop(length)

    def stored(self) -> Stored:
        return self._ring.stored(self._rows, self.dtype)

    def _storages(self) -> tuple[Storage, ...]:
        return self._ring.k, self._ring.v

    def _write(self, k: Tensor, v: Tensor, counts: list[int] | None) -> None:
        self._ring.write(k, v, self._rows.value(), counts)
        if self._rows.shortest < self.prefix:
            new = [k.shape[2]] * self.batch_size if counts is None else counts
            first = [max(min(self.prefix - row, count), 0) for row, count in zip(self.row_lengths(), new, strict=True)]
            self._ring.write_first(k, v, self._rows.value(), first)

    def _read(self) -> tuple[Tensor, Tensor]:
        kept = self._ring.kept
        if kept.uniform:
            count = min(self.length, kept.shortest + self.prefix)
        else:
            rows = zip(self.row_lengths(), kept.host(), strict=True)
            count = max(min(row, held + self.prefix) for row, held in rows)
        return self._ring.read(self.first, count)

    def _move(self, indices: Tensor, in_place: bool) -> None:
        self._ring.take(indices, in_place)

    def _shrink(self, ends: list[int]) -> None:
        before, held = self.row_lengths(), self._ring.kept.host()
        kept = self._ring.kept_after(before, ends)
        for row, (old, end, count) in enumerate(zip(before, ends, kept, strict=True)):
            if count < self.window:
                least = old - held[row] + self.window
                raise ValueError(
                    f"length is {end} for row {row}, which has {old} tokens and has dropped its oldest: with window "
                    f"{self.window} and margin {self.margin} it can be cropped to {least} or more now, or to 0"
                )
        self._ring.kept.set(kept)


@dataclass(frozen=True)
class _Seen:
    """What the queries of a long chunk attend to: keys and values of positions `first` and on, after the prefix's."""

    k: Tensor
    v: Tensor
    rows: RowLengths
    first: int | Tensor
    kept: int
    prefix: int

    @property
    def length(self) -> int:
        return self.rows.longest

    @property
    def uniform(self) -> bool:
        return self.rows.uniform

    @property
    def lengths(self) -> Tensor:
        return self.rows.tensor()

    def row_lengths(self) -> list[int]:
        return self.rows.host()

    def view(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v
