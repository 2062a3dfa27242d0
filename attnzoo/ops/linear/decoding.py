"""Linear and hybrid attention of new tokens over a recurrent state and the last few keys, which are still apart."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from attnzoo.ops.linear.api import linear_attention, linear_step
from attnzoo.ops.linear.common import State
from attnzoo.ops.linear.stepping import MOST_TOKENS, from_tail, hybrid_step, takes_kernel
from attnzoo.ops.linear.tail import Ring, Tail

_PIECE = 128  # queries that look at the tail together


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
    def lengths(self) -> Tensor: ...

    @property
    def ring(self) -> Ring: ...

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
    ring = cache.ring
    if cache.window is None and ring.size == 0:
        return _from_state(*features, v, cache, scale, lengths)
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, *features))
    few = 0 < q.shape[2] <= MOST_TOKENS and not needs_gradient
    whole = cache.window is not None and ring.size == cache.window - 1  # nothing is kept apart for a rollback
    if few and whole and takes_kernel(q, *features, v, cache.state, ring):
        given: Any = {
            "q_features": q_features,
            "k_features": k_features,
            "near_weight": near_weight,
            "lengths": lengths,
        }
        out = linear_decode_in_place(q, k, v, cache, cache.lengths, scale=scale, **given)
        cache.advance(q.shape[2], lengths)
        return out
    outs = [v.new_zeros(*q.shape[:2], 0, v.shape[3])]
    for start in range(0, q.shape[2], _PIECE):
        at = slice(start, min(start + _PIECE, q.shape[2]))
        q_at, k_at, f_q, f_k, v_at = (t[:, :, at] for t in (q, k, *features, v))
        real = None if lengths is None else (lengths - start).clamp(0, at.stop - start)
        settings = cache.feature_map, cache.log_decay, cache.window
        with torch.autocast(q.device.type, enabled=False):
            new = q_at, k_at, f_q, f_k, v_at
            outs.append(from_tail(*new, cache.tail, cache.state, *settings, near_weight, scale, real))
        cache.append(f_k, v_at, real, keys=k_at if cache.window is not None else None)
    return torch.cat(outs, dim=2)


def linear_decode_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: StateCache,
    before: Tensor,
    *,
    q_features: Tensor | None = None,
    k_features: Tensor | None = None,
    near_weight: Tensor | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """As `linear_decode` of at most 16 tokens, on the device alone: a CUDA graph can hold it. It has no gradient.

    The cache's state and ring are written in place, and nothing is counted: that is left to `cache.advance`.

    Args:
        q, k, v, cache, q_features, k_features, near_weight, scale, lengths: as of `linear_decode`.
        before: tokens that each row of the cache holds, `[B]`.

    Raises:
        ValueError: for tensors that do not fit, and a cache whose tokens can be taken back (rollback).
    """
    apart = 0 if cache.window is None else cache.window - 1
    if cache.ring.size != apart:
        raise ValueError(f"cache keeps {cache.ring.size} tokens out of its state, {apart} is what a step needs")
    f_q, f_k = q if q_features is None else q_features, k if k_features is None else k_features
    if cache.window is None:
        settings: Any = {"feature_map": cache.feature_map, "log_decay": cache.log_decay}
        return linear_step(f_q, f_k, v, cache.state, **settings, scale=scale, lengths=lengths)
    return hybrid_step(
        q,
        k,
        v,
        cache.state,
        cache.ring,
        before,
        q_features=f_q,
        k_features=f_k,
        feature_map=cache.feature_map,
        near_weight=near_weight,
        scale=scale,
        lengths=lengths,
    )


def _from_state(
    q: Tensor, k: Tensor, v: Tensor, cache: StateCache, scale: float | None, lengths: Tensor | None
) -> Tensor:
    """Nothing is kept apart from the state: one call, in place for a few tokens."""
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if q.shape[2] <= MOST_TOKENS and not needs_gradient:
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
