"""A cache whose lengths stand on the device, so that one captured step serves every length."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.caches import PagedCache
from attnzoo.caches.token_cache import TokenCache
from attnzoo.ops.decoding import Rows, Stored
from attnzoo.ops.decoding.store import places, store
from attnzoo.ops.decoding.stored import columns_of


class Clock:
    """How many tokens each row has, on the device: before the step that runs, and after it. All layers share it.

    Args:
        lengths: tokens of each row now.
        device: of the caches.
    """

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.before = torch.tensor(lengths, dtype=torch.int64, device=device)
        self.after = self.before + 1
        self.rows = torch.arange(len(lengths), device=device)
        self._firsts: dict[int, Tensor] = {}

    def set(self, lengths: list[int]) -> None:
        """Start again from these lengths, in the same memory."""
        self.before.copy_(torch.tensor(lengths, dtype=torch.int64))
        self.after.copy_(self.before + 1)
        self._update_firsts()

    def first(self, kept: int) -> Tensor:
        """Position of the oldest token, `[B]`, where the newest `kept` are held; worked out once a step."""
        if kept not in self._firsts:
            self._firsts[kept] = (self.after - kept).clamp(min=0)
        return self._firsts[kept]

    def tick(self) -> None:
        """The step is over; on the device only."""
        self.before.add_(1)
        self.after.add_(1)
        self._update_firsts()

    def _update_firsts(self) -> None:
        for kept, first in self._firsts.items():
            first.copy_((self.after - kept).clamp(min=0))


class OnDevice:
    """What `decode` and `latent_decode` read, over a cache's own memory; the step's token is among it once written.

    Only what kernels read is given without a copy: `view` gathers, for other backends.

    Args:
        memory: the cache; its rows are no longer than `room`.
        clock: the lengths.
        room: tokens that a row may come to have.
    """

    uniform = False

    def __init__(self, memory: TokenCache, clock: Clock, room: int) -> None:
        held = memory.stored()
        self.memory, self.clock, self.length = memory, clock, room
        self._stored = held._replace(lengths=Rows(0, clock.after), longest=room)
        self._encode = [storage.encode for storage in memory._storages()]
        self.kept = None if not held.ring or held.kept is None else held.kept.base
        self.prefix = held.prefix

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, the step's own included, `[B]`."""
        return self.clock.after

    @property
    def first(self) -> int | Tensor:
        """Position of the view's first column."""
        return 0 if self.kept is None else self.clock.first(self.kept + self.prefix)

    def row_lengths(self) -> list[int]:
        """Tokens of each row; waits for the device."""
        lengths: list[int] = self.clock.after.tolist()
        return lengths

    def stored(self) -> Stored:
        """Where everything stands, for kernels."""
        return self._stored

    def write(self, k: Tensor, v: Tensor) -> None:
        """Put the step's `k [B, Hk, 1, D]` and `v [B, Hk, 1, Dv]` in their places."""
        store(self._stored, k, v, self.clock.before, (self._encode[0], self._encode[-1]))

    def view(self) -> tuple[Tensor, Tensor]:
        """Keys `[B, Hk, n, D]` and values `[B, Hk, n, Dv]` by position from `first` on, as wide as the longest row may
        come to be; a copy."""
        held = self._stored
        count = self.length if self.kept is None else min(self.kept + self.prefix, self.length)
        first = self.first[:, None] if isinstance(self.first, Tensor) else self.first
        positions = first + torch.arange(count, device=self.clock.rows.device)[None]  # [1 or B, n]
        positions = positions.expand(len(self.clock.rows), -1)
        blocks, slots = places(held, positions)
        slots = columns_of(slots, held.size, held.prefix if held.ring else 0)
        whole = [_decoded(parts, blocks, slots, held.dtype) for parts in (held.k, held.v)]
        if held.recent is not None and held.kept is not None:
            kept = held.kept.base if held.kept.more is None else held.kept.base + held.kept.more[:, None]
            near = positions >= self.clock.after[:, None] - kept  # [B, n]
            slots = positions % held.recent.size
            rows = self.clock.rows[:, None]
            fresh = [parts[0][rows, :, slots].transpose(1, 2) for parts in (held.recent.k, held.recent.v)]
            whole = [torch.where(near[:, None, :, None], new, old) for new, old in zip(fresh, whole, strict=True)]
        return whole[0], whole[1]

    def count(self, steps: int) -> None:
        """Tell the cache, which counts on the host, that each row got `steps` tokens."""
        self.memory._rows.add(steps)
        if isinstance(self.memory, PagedCache):
            self.memory._count_ready(self.memory.row_lengths())


def _decoded(parts: tuple[Tensor, ...], blocks: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """What stands there, `[B, Hk, n, D]`, as it was appended."""
    found = [part[blocks, :, slots].transpose(1, 2) for part in parts]
    if len(found) == 1:
        return found[0]
    x = found[0].float() * found[1]
    return (x if len(found) == 2 else x + found[2]).to(dtype)
