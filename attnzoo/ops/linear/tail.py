"""The last few tokens that a recurrent state has not summed up yet: a ring in memory, a tail to compute with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.ops.linear.common import State, apply_map


class Ring(NamedTuple):
    """The memory of the last T tokens: that of position p in slot `p % T`. Unused slots hold anything."""

    keys: Tensor | None  # [B, Hk, T, D], for the window's softmax; None where the features are the keys
    features: Tensor  # [B, Hk, T, F], before the elementwise map
    v: Tensor  # [B, Hk, T, Dv]

    @property
    def size(self) -> int:
        """T."""
        return self.v.shape[2]


class Tail(NamedTuple):
    """The last tokens, right-aligned: row b's are the last `alive[b]` of the T slots; the others hold anything."""

    keys: Tensor  # [B, Hk, T, D], for the window's softmax; the features themselves where both are the same
    features: Tensor  # [B, Hk, T, F], before the elementwise map
    v: Tensor  # [B, Hk, T, Dv]
    alive: Tensor  # [B]


def tail_of(ring: Ring, rows: Tensor, alive: Tensor) -> Tail:
    """A copy of the ring of rows of `rows [B]` tokens, of which the last `alive [B]` are there."""
    slots = (rows[:, None] + torch.arange(ring.size, device=rows.device)) % max(ring.size, 1)  # [B, T]
    keys, features, v = (None if t is None else _take(t, slots) for t in ring)
    assert features is not None and v is not None
    return Tail(features if keys is None else keys, features, v, alive)


def take_in(
    ring: Ring,
    tail: Tail,
    state: State,
    new: tuple[Tensor | None, Tensor, Tensor],
    rows: Tensor,
    counts: Tensor,
    feature_map: str,
    log_decay: Tensor | None,
) -> State:
    """Write new tokens into the ring, in place; the state with those in it that they push out.

    Args:
        ring, tail: the memory, and what stands in it.
        state: the sums before; it stays as it is.
        new: keys (None where the ring has none), features and values, `[B, Hk, S, *]`.
        rows: tokens of each row before, `[B]`.
        counts: how many of the S tokens of each row are real, `[B]`.
        feature_map, log_decay: of the state.
    """
    size, count = ring.size, new[1].shape[2]
    old = (None if ring.keys is None else tail.keys, tail.features, tail.v)
    keys, features, v = (
        None if was is None or fresh is None else torch.cat([was, fresh.detach()], dim=2)
        for was, fresh in zip(old, new, strict=True)
    )
    assert features is not None and v is not None
    # Row b's first alive + counts - T tokens leave. If any do, they stand before slot counts[b] <= S.
    start = (size - tail.alive).clamp(max=counts)
    state = absorb(state, features[:, :, :count], v[:, :, :count], start, counts, feature_map, log_decay)
    # Slot i gets what stands at counts[b] + (i - rows after) mod T: the last T of old and new.
    after = rows + counts
    slots = counts[:, None] + (torch.arange(size, device=rows.device) - after[:, None]) % max(size, 1)  # [B, T]
    for memory, joined in zip(ring, (keys, features, v), strict=True):
        if memory is not None and joined is not None:
            memory.copy_(_take(joined, slots))
    return state


def absorb(
    state: State, k: Tensor, v: Tensor, start: Tensor, end: Tensor, feature_map: str, log_decay: Tensor | None
) -> State:
    """The state after row b's tokens `start[b]` to `end[b]` of `k [B, Hk, S, D]` and `v [B, Hk, S, Dv]`."""
    dtype, slot = state.s.dtype, torch.arange(k.shape[2], device=k.device)
    leaves = ((slot >= start[:, None]) & (slot < end[:, None]))[:, None, :, None]  # [B, 1, S, 1]
    features = apply_map(feature_map, k.to(dtype).masked_fill(~leaves, 0)).masked_fill(~leaves, 0)
    v = v.to(dtype).masked_fill(~leaves, 0)
    s, z = state
    if log_decay is not None:
        log_decay = log_decay.to(dtype)[:, None, None]
        end, start = end[:, None, None, None], start[:, None, None, None]
        features = features * torch.exp(log_decay * (end - 1 - slot[:, None]).clamp(min=0))
        fade = torch.exp(log_decay * (end - start).clamp(min=0))  # [B, Hk, 1, 1]
        s, z = s * fade, None if z is None else z * fade[..., 0]
    with torch.autocast(k.device.type, enabled=False):
        s = s + features.mT @ v
    return State(s, None if z is None else z + features.sum(2))


def _take(t: Tensor, slots: Tensor) -> Tensor:
    """Of `t [B, H, n, D]` row b's slots `slots[b]`."""
    return t.take_along_dim(slots[:, None, :, None], dim=2)
