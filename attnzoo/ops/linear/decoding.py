"""Linear and hybrid attention of new tokens over a recurrent state and the last few keys, which are still apart."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from attnzoo.ops.linear.api import linear_attention, linear_step
from attnzoo.ops.linear.common import State, apply_map, inverse_or_zero
from attnzoo.ops.linear.hybrid import near_weights
from attnzoo.ops.softmax.common import accumulation_dtype

_STEPS = 16  # tokens up to which the state is stepped in place
_PIECE = 128  # queries that look at the tail together


class Tail(NamedTuple):
    """The last tokens, right-aligned: row b's are the last `alive[b]` of the T slots; the others hold anything."""

    keys: Tensor  # [B, Hk, T, D], for the window's softmax; the features themselves where both are the same
    features: Tensor  # [B, Hk, T, F], before the elementwise map
    v: Tensor  # [B, Hk, T, Dv]
    alive: Tensor  # [B]


class StateCache(Protocol):
    """What `linear_decode` needs of a cache; `attnzoo.caches.RecurrentStateCache` has it."""

    @property
    def feature_map(self) -> str: ...

    @property
    def log_decay(self) -> Tensor | None: ...

    @property
    def window(self) -> int | None: ...

    @property
    def state(self) -> State: ...

    @state.setter
    def state(self, state: State) -> None: ...

    @property
    def tail(self) -> Tail: ...

    def check_new(self, k: Tensor, v: Tensor, lengths: Tensor | None, keys: Tensor | None) -> None: ...

    def append(self, k: Tensor, v: Tensor, lengths: Tensor | None = None, *, keys: Tensor | None = None) -> None: ...

    def advance(self, count: int, lengths: Tensor | None) -> None: ...


def linear_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: StateCache,
    *,
    q_features: Tensor | None = None,
    k_features: Tensor | None = None,
    near_weight: Tensor | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Attend causally from new tokens to a cache and themselves, and append them to it.

    What `linear_attention` (or `hybrid_attention`, if the cache has a window) of the whole sequence gives for its last
    tokens, in memory linear in their number.

    Args:
        q: `[B, Hq, S, D]`.
        k: `[B, Hk, S, D]`.
        v: `[B, Hk, S, Dv]`.
        cache: state and last tokens; feature map, decay, window and normaliser are the cache's.
        q_features, k_features: what the cache's feature map is applied to; None: q and k.
        near_weight: as of `hybrid_attention`; only with a window.
        scale: of the near scores with a window, else of the weights; D ** -0.5 unless given.
        lengths: `[B]`, how many of the S tokens are real (right padding); the others give 0.

    Returns:
        `[B, Hq, S, Dv]` in the values' dtype.

    Raises:
        ValueError: for tensors that the cache does not take, before it is touched.
    """
    features = q if q_features is None else q_features, k if k_features is None else k_features
    if cache.window is None and near_weight is not None:
        raise ValueError("near_weight given for a cache without a window")
    cache.check_new(features[1], v, lengths, k if cache.window is not None else None)
    if q.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"q must be [B, a multiple of Hk, S, D] for k {list(k.shape)}, got {list(q.shape)}")
    if cache.window is None and cache.tail.v.shape[2] == 0:
        return _from_state(*features, v, cache, scale, lengths)
    outs = [v.new_zeros(*q.shape[:2], 0, v.shape[3])]
    for start in range(0, q.shape[2], _PIECE):
        at = slice(start, min(start + _PIECE, q.shape[2]))
        q_at, k_at, f_q, f_k, v_at = (t[:, :, at] for t in (q, k, *features, v))
        real = None if lengths is None else (lengths - start).clamp(0, at.stop - start)
        with torch.autocast(q.device.type, enabled=False):
            outs.append(_from_tail(q_at, k_at, f_q, f_k, v_at, cache, near_weight, scale, real))
        cache.append(f_k, v_at, real, keys=k_at if cache.window is not None else None)
    return torch.cat(outs, dim=2)


def _from_state(
    q: Tensor, k: Tensor, v: Tensor, cache: StateCache, scale: float | None, lengths: Tensor | None
) -> Tensor:
    """Nothing is kept apart from the state: one call, in place for a few tokens."""
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if q.shape[2] <= _STEPS and not needs_gradient:
        out = linear_step(
            q, k, v, cache.state, feature_map=cache.feature_map, log_decay=cache.log_decay, scale=scale, lengths=lengths
        )
    else:
        out, cache.state = linear_attention(
            q,
            k,
            v,
            feature_map=cache.feature_map,
            normalize=cache.state.z is not None,
            log_decay=cache.log_decay,
            scale=scale,
            key_lengths=lengths,
            initial_state=cache.state,
            return_state=True,
        )
    cache.advance(q.shape[2], lengths)
    return out


def _from_tail(
    q: Tensor,
    k: Tensor,
    f_q: Tensor,
    f_k: Tensor,
    v: Tensor,
    cache: StateCache,
    near_weight: Tensor | None,
    scale: float | None,
    lengths: Tensor | None,
) -> Tensor:
    """A piece of at most `_PIECE` queries over the state, the tail and the piece itself, with weights written out."""
    dtype, tail, state, window = accumulation_dtype(f_k.dtype), cache.tail, cache.state, cache.window
    heads, new, held, device = k.shape[1], q.shape[2], tail.v.shape[2], q.device
    t, slot = torch.arange(new, device=device), torch.arange(held + new, device=device)
    live = slot >= held - tail.alive[:, None]  # [B, T + S]
    if lengths is not None:
        live = live & (slot < held + lengths[:, None])
    age = held + t[:, None] - slot  # [S, T + S]
    seen = live[:, None, None, None] & (age >= 0)  # [B, 1, 1, S, T + S]

    real_q, real_k = live[:, None, held:, None], live[:, None, :, None]
    f_q = apply_map(cache.feature_map, f_q.to(dtype).masked_fill(~real_q, 0)).unflatten(1, (heads, -1))
    f_k = torch.cat([tail.features.to(dtype), f_k.to(dtype)], dim=2).masked_fill(~real_k, 0)
    f_k = apply_map(cache.feature_map, f_k)
    v_all = torch.cat([tail.v.to(dtype), v.to(dtype)], dim=2).masked_fill(~real_k, 0)
    joint = state.s
    if state.z is not None:
        joint = torch.cat([state.s, state.z[..., None]], dim=-1)
        v_all = torch.cat([v_all, torch.ones_like(v_all[..., :1])], dim=-1)

    weights = f_q @ f_k[:, :, None].mT * (seen if window is None else seen & (age >= window))
    carried = f_q @ joint[:, :, None]
    if cache.log_decay is not None:
        log_decay = cache.log_decay.to(dtype)[:, None, None, None]  # [Hk, 1, 1, 1]
        weights = weights * torch.exp(log_decay * age.clamp(min=0))
        since = tail.alive[:, None, None, None, None] + 1 + t[:, None]  # [B, 1, 1, S, 1]
        carried = carried * torch.exp(log_decay * since)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if window is not None:
        near_q = q.to(dtype).masked_fill(~real_q, 0).unflatten(1, (heads, -1)) * factor
        near_k = torch.cat([tail.keys.to(dtype), k.to(dtype)], dim=2).masked_fill(~real_k, 0)
        gain = q.new_ones(q.shape[1]) if near_weight is None else near_weight
        gain = gain.to(dtype).reshape(heads, -1, 1, 1)
        weights = weights + near_weights(near_q @ near_k[:, :, None].mT, seen & (age < window), gain)
    out = weights @ v_all[:, :, None] + carried  # [B, Hk, G, S, Dv (+ 1)]
    out = out * factor if state.z is None else out[..., :-1] * inverse_or_zero(out[..., -1:])
    return out.flatten(1, 2).masked_fill(~real_q, 0).to(v.dtype)


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
