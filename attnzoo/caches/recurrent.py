"""The cache of linear attention: a state of constant size, and the last few tokens while they may still be needed."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from attnzoo.caches.base import Cache, host_lengths
from attnzoo.caches.lengths import RowLengths
from attnzoo.ops.linear import State
from attnzoo.ops.linear.common import FEATURE_MAPS
from attnzoo.ops.linear.tail import Ring, Tail, tail_of, take_in


class RecurrentStateCache(Cache):
    """Sums over all tokens but the last T, `s [B, Hk, F, Dv]` and `z [B, Hk, F]` in fp32 (fp64 for fp64), and those T.

    `T = (window - 1) + rollback`: a window's softmax needs its tokens one by one, and a token that is not in the sums
    yet can be cropped without a trace. A token enters the sums when T others came after it. The size never grows, and
    the T stand in a ring, so that a step moves nothing.

    Args:
        batch_size: rows.
        num_kv_heads: heads of keys and values.
        head_dim: F, size of a key's features.
        v_head_dim: size of a value; None: `head_dim`.
        feature_map: "identity", "elu" or "relu", applied to what is appended as it enters a sum.
        normalize: whether there is a z.
        log_decay: `[Hk]`, natural log of each head's decay a token; None: none.
        window: keys that a softmax sees (hybrid attention); None: none.
        key_dim: size of the window's keys where these are not the features; appended as `keys`.
        rollback: how many of a row's tokens `crop` can take back, counted from the longest that it has been.
        dtype: of the last tokens' values and keys.
        feature_dtype: of their features; None: `dtype`.
        device: of everything.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        feature_map: str = "identity",
        normalize: bool = True,
        log_decay: Tensor | None = None,
        window: int | None = None,
        key_dim: int | None = None,
        rollback: int = 0,
        dtype: torch.dtype | None = None,
        feature_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.batch_size, self.num_kv_heads, self.max_length = batch_size, num_kv_heads, sys.maxsize
        self.head_dim, self.v_head_dim = head_dim, head_dim if v_head_dim is None else v_head_dim
        for name in ("batch_size", "num_kv_heads", "head_dim", "v_head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if window is not None and (window < 1 or not normalize or log_decay is not None):
            raise ValueError(f"window is {window}; it must be at least 1, with a normaliser and without a decay")
        if rollback < 0:
            raise ValueError(f"rollback is {rollback}; it must be at least 0")
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map is {feature_map!r}; it must be one of {list(FEATURE_MAPS)}")
        if key_dim is not None and window is None:
            raise ValueError(f"key_dim is {key_dim} without a window, which alone reads keys")
        self.feature_map, self.normalize, self.log_decay = feature_map, normalize, log_decay
        self.window, self.key_dim, self.rollback = window, key_dim, rollback
        held = (0 if window is None else window - 1) + rollback
        shape = (batch_size, num_kv_heads, held)
        self._features = torch.zeros(*shape, head_dim, dtype=feature_dtype or dtype, device=device)
        self._v = torch.zeros(*shape, self.v_head_dim, dtype=dtype, device=device)
        self._keys = None if key_dim is None else torch.zeros(*shape, key_dim, dtype=dtype, device=device)
        wide = torch.float64 if self._v.dtype == torch.float64 else torch.float32
        s = torch.zeros(batch_size, num_kv_heads, head_dim, self.v_head_dim, dtype=wide, device=device)
        self._state = State(s, torch.zeros_like(s[..., 0]) if normalize else None)
        self._rows = RowLengths(batch_size, self._v.device)
        self._summed = RowLengths(batch_size, self._v.device)  # tokens of each row that are in the sums

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
        return self._v.dtype

    @property
    def device(self) -> torch.device:
        return self._v.device

    @property
    def state(self) -> State:
        """The sums."""
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        self._state = State(state.s.detach(), None if state.z is None else state.z.detach())

    @property
    def ring(self) -> Ring:
        """The memory of the tokens that are not in the sums."""
        return Ring(self._keys, self._features, self._v)

    @property
    def tail(self) -> Tail:
        """The tokens that are not in the sums, in order; a copy."""
        rows = self._rows.tensor()
        return tail_of(self.ring, rows, rows - self._summed.tensor())

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return sum(t.nbytes for t in (*self._state, *self.ring) if t is not None)

    def row_lengths(self) -> list[int]:
        return self._rows.host()

    def view(self) -> tuple[Tensor, Tensor]:
        """A ValueError: the tokens are summed up, and no longer there one by one."""
        raise ValueError("a recurrent state holds no keys and values to view; read its state and tail")

    def append(self, k: Tensor, v: Tensor, lengths: Tensor | None = None, *, keys: Tensor | None = None) -> None:
        """Add S tokens after each row's last.

        Args:
            k: features `[B, Hk, S, F]`, before the elementwise map.
            v: `[B, Hk, S, Dv]`.
            lengths: `[B]` int64 or int32, how many of the S tokens are real (right padding); None: all.
                Reading it waits for the device.
            keys: `[B, Hk, S, key_dim]`, where the cache has a key_dim.

        Raises:
            ValueError: for another shape, dtype or device than the cache's, or lengths out of range. Nothing has been
                written then.
        """
        self.check_new(k, v, lengths, keys)
        rows = self._rows.tensor()
        counts = torch.full_like(rows, k.shape[2]) if lengths is None else lengths
        new = (None if self._keys is None else keys, k, v)
        self.state = take_in(self.ring, self.tail, self._state, new, rows, counts, self.feature_map, self.log_decay)
        self.advance(k.shape[2], lengths)

    def advance(self, count: int, lengths: Tensor | None) -> None:
        """Count `count` tokens a row, or `lengths` of them, that state and tail have taken in already."""
        held = self._v.shape[2]
        before, summed = self._rows.host(), self._summed.host()
        steady = all(row - base == held for row, base in zip(before, summed, strict=True))
        if lengths is None:
            self._rows.add(count)
        else:
            self._rows.set([row + more for row, more in zip(before, lengths.tolist(), strict=True)])
        if lengths is None and steady:
            self._summed.add(count)
        else:
            after = self._rows.host()
            self._summed.set([max(base, row - held) for base, row in zip(summed, after, strict=True)])

    def crop(self, length: int) -> None:
        """Keep at most the first `length` tokens of each row.

        Raises:
            ValueError: for a row that would lose tokens that are in the sums already, or lose what its window needs.
                `rollback` tokens can go, and all of them (`length` 0).
        """
        if length < 0:
            raise ValueError(f"length is {length}; it must be at least 0")
        if length == 0:
            return self.reset()
        near = 0 if self.window is None else self.window - 1
        rows, summed = self._rows.host(), self._summed.host()
        for row, base in zip(rows, summed, strict=True):
            if length < row and base > 0 and length < base + near:
                raise ValueError(
                    f"length is {length}; a row of {row} tokens has {base} of them summed up and can only be cropped "
                    f"to {base + near} or more, or to 0 (rollback is {self.rollback})"
                )
        self._rows.set([min(row, length) for row in rows])

    def reorder(self, indices: Tensor) -> None:
        if indices.shape != (self.batch_size,):
            raise ValueError(f"indices has shape {list(indices.shape)}; it must be [{self.batch_size}]")
        self.select(indices)

    def select(self, indices: Tensor) -> None:
        if indices.dim() != 1 or len(indices) == 0 or indices.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"indices is {indices.dtype} of shape {list(indices.shape)}; it must be row numbers, int64 or int32"
            )
        if indices.device.type == "cpu" and not 0 <= int(indices.min()) <= int(indices.max()) < self.batch_size:
            raise ValueError(f"indices is {indices.tolist()}; each must be from 0 to {self.batch_size - 1}")
        keys = self._keys
        self._features, self._v = self._features.index_select(0, indices), self._v.index_select(0, indices)
        self._keys = None if keys is None else keys.index_select(0, indices)
        s, z = self._state
        self._state = State(s.index_select(0, indices), None if z is None else z.index_select(0, indices))
        self.batch_size = len(indices)
        for rows in (self._rows, self._summed):
            rows.take(indices)

    def repeat(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"count is {count}; it must be at least 1")
        self.select(torch.arange(self.batch_size, device=self.device).repeat_interleave(count))

    def reset(self) -> None:
        for t in self._state:
            if t is not None:
                t.zero_()
        self._rows.set([0] * self.batch_size)
        self._summed.set([0] * self.batch_size)

    def check_new(self, k: Tensor, v: Tensor, lengths: Tensor | None, keys: Tensor | None) -> None:
        """ValueError unless the tokens are of the cache's shape, dtype and device."""
        given = [("k", k, self._features), ("v", v, self._v)]
        if self._keys is not None:
            if keys is None:
                raise ValueError(f"keys is None; this cache takes keys of size {self.key_dim} for its window")
            given.append(("keys", keys, self._keys))
        new = k.shape[2] if k.dim() == 4 else -1
        for name, t, like in given:
            size = like.shape[3]
            if tuple(t.shape) != (self.batch_size, self.num_kv_heads, new, size):
                expected = f"[{self.batch_size}, {self.num_kv_heads}, S, {size}]"
                raise ValueError(f"{name} has shape {list(t.shape)}; this cache takes {expected}")
            if t.dtype != like.dtype or t.device != like.device:
                raise ValueError(f"{name} is {t.dtype} on {t.device}; this cache is {like.dtype} on {like.device}")
        if lengths is not None:
            host_lengths(lengths, self.batch_size, new)
