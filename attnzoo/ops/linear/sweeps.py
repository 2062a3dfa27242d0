"""The sweeps of the chunked backend: over a span of tokens, reading the state and its gradient as they pass.

In a sweep queries are `[b, Hk, G * c, D]`, the heads of a group laid out as further tokens; values are `[b, Hk, c, E]`
with `E = Dv + 1` where there is a normaliser; the state is `[n, Hk, D, E]`. All in the accumulation dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.ops.linear.common import apply_map, map_slope
from attnzoo.ops.softmax.common import accumulation_dtype


class Span(NamedTuple):
    """Tokens that share a state: all rows, or one packed document."""

    tokens: slice
    states: slice  # which of the N states are theirs
    length: int


class Chunk(NamedTuple):
    """A chunk's tensors. What stands in padding is zeroed, so NaN there reaches nothing."""

    at: slice
    q: Tensor  # features, scaled
    k: Tensor  # features
    v: Tensor
    weights: Tensor  # [1 | Hk, G * c, c]: decay^(i - j) where j <= i, else 0
    since: Tensor | None  # [Hk, G * c, 1]: decay^(i + 1), the age of the state that a query reads; None: 1
    until: Tensor | None  # [b | 1, Hk, c, 1]: decay of a key until the chunk's end; None: 1
    fade: Tensor | None  # [b | 1, Hk, 1, 1]: decay of the state over the chunk; None: 1


class Inputs(NamedTuple):
    """The operator's arguments, with the steps that forward and backward share."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    key_lengths: Tensor | None
    cu_seqlens: Tensor | None
    feature_map: str
    causal: bool
    scale: float
    normalize: bool
    chunk: int

    @property
    def dtype(self) -> torch.dtype:
        return accumulation_dtype(self.k.dtype)

    def spans(self) -> Iterator[Span]:
        """Every span. Tokens past the last boundary are in none."""
        if self.cu_seqlens is None:
            yield Span(slice(0, self.k.shape[2]), slice(None), self.k.shape[2])
            return
        ends = self.cu_seqlens.tolist()
        for n in range(len(ends) - 1):
            yield Span(slice(ends[n], ends[n + 1]), slice(n, n + 1), ends[n + 1] - ends[n])

    def chunks(self, tokens: slice) -> list[slice]:
        """The span cut into chunks."""
        starts = range(tokens.start, tokens.stop, self.chunk)
        return [slice(start, min(start + self.chunk, tokens.stop)) for start in starts]

    def queries(self, span: Span) -> slice:
        """The queries of a span; without causality they may be more or fewer than its keys."""
        return span.tokens if self.cu_seqlens is not None else slice(0, self.q.shape[2])

    def dead(self, at: slice) -> Tensor | None:
        """Which tokens of a chunk are padding, `[B, 1, c, 1]`."""
        if self.key_lengths is None:
            return None
        return (torch.arange(at.start, at.stop, device=self.k.device) >= self.key_lengths[:, None])[:, None, :, None]

    def load_q(self, at: slice) -> Tensor:
        """The scaled features of some queries. Only under causality do lengths count for queries too."""
        q = self.q[:, :, at].to(self.dtype)
        dead = self.dead(at) if self.causal else None
        q = apply_map(self.feature_map, q if dead is None else q.masked_fill(dead, 0)) * self.scale
        return self.grouped(q if dead is None else q.masked_fill(dead, 0))

    def load_kv(self, at: slice) -> tuple[Tensor, Tensor]:
        """The features of some keys, and their values, with a column of ones for the normaliser."""
        k, v, dead = self.k[:, :, at].to(self.dtype), self.v[:, :, at].to(self.dtype), self.dead(at)
        if dead is not None:
            k, v = k.masked_fill(dead, 0), v.masked_fill(dead, 0)
        k = apply_map(self.feature_map, k)
        if dead is not None:
            k = k.masked_fill(dead, 0)
        return k, torch.cat([v, torch.ones_like(v[..., :1])], dim=-1) if self.normalize else v

    def load(self, at: slice) -> Chunk:
        """A chunk of a causal sweep."""
        k, v = self.load_kv(at)
        size, group = at.stop - at.start, self.q.shape[1] // self.k.shape[1]
        place = torch.arange(size, device=k.device)
        ages = place[:, None] - place
        if self.log_decay is None:
            weights = (ages >= 0).to(self.dtype).repeat(group, 1)[None]
            return Chunk(at, self.load_q(at), k, v, weights, None, None, None)
        log_decay = self.log_decay.to(self.dtype)[:, None, None]  # [Hk, 1, 1]
        weights = torch.exp(log_decay * ages.clamp(min=0)) * (ages >= 0)
        since = torch.exp(log_decay * (place + 1)[:, None])
        real = torch.full((1,), size, device=k.device)  # a shorter row's state stops at its end
        if self.key_lengths is not None:
            real = (self.key_lengths - at.start).clamp(0, size)
        left = (real[:, None, None, None] - 1 - place[:, None]).clamp(min=0)
        until, fade = torch.exp(log_decay * left), torch.exp(log_decay * real[:, None, None, None])
        return Chunk(at, self.load_q(at), k, v, weights.repeat(1, group, 1), since.repeat(1, group, 1), until, fade)

    def grouped(self, t: Tensor) -> Tensor:
        """`[b, Hq, c, D]` as `[b, Hk, G * c, D]`."""
        return t.unflatten(1, (self.k.shape[1], -1)).flatten(2, 3)

    def ungrouped(self, t: Tensor) -> Tensor:
        """The way back."""
        return t.unflatten(2, (self.q.shape[1] // self.k.shape[1], -1)).flatten(1, 2)

    def put_d_q(self, d_q: Tensor, at: slice, d_features: Tensor) -> None:
        """Write the gradient of some queries, given that of their features."""
        slope = map_slope(self.feature_map, self.q[:, :, at].to(self.dtype))
        self._put(d_q, at, self.ungrouped(d_features) * slope * self.scale, self.dead(at) if self.causal else None)

    def put_d_kv(self, d_k: Tensor, d_v: Tensor, at: slice, d_features: Tensor, d_values: Tensor) -> None:
        """Write the gradients of some keys and values."""
        self._put(d_k, at, d_features * map_slope(self.feature_map, self.k[:, :, at].to(self.dtype)), self.dead(at))
        self._put(d_v, at, d_values[..., : d_v.shape[3]], self.dead(at))

    def _put(self, total: Tensor, at: slice, part: Tensor, dead: Tensor | None) -> None:
        total[:, :, at] = (part if dead is None else part.masked_fill(dead, 0)).to(total.dtype)


def read_causal(x: Inputs, span: Span, state: Tensor, out: Tensor) -> None:
    """Write what the queries of a span read, and leave the state as it is after the span."""
    s = state[span.states]
    for at in x.chunks(span.tokens):
        c = x.load(at)
        out[:, :, at] = x.ungrouped((c.q @ c.k.mT * c.weights) @ c.v + _times(c.q @ s, c.since))
        s = _times(s, c.fade) + _times(c.k, c.until).mT @ c.v
    state[span.states] = s


def unread_causal(
    x: Inputs, span: Span, state: Tensor, d_state: Tensor, d_out: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor
) -> None:
    """The gradients of a span; `d_state` becomes that of the state before it."""
    s = state[span.states]
    for at in x.chunks(span.tokens):
        c, d_o = x.load(at), x.grouped(d_out[:, :, at])
        x.put_d_q(d_q, at, (d_o @ c.v.mT * c.weights) @ c.k + _times(d_o @ s.mT, c.since))
        s = _times(s, c.fade) + _times(c.k, c.until).mT @ c.v
    d_s = d_state[span.states]
    for at in reversed(x.chunks(span.tokens)):
        c, d_o = x.load(at), x.grouped(d_out[:, :, at])
        d_features = (d_o @ c.v.mT * c.weights).mT @ c.q + _times(c.v @ d_s.mT, c.until)
        d_values = (c.q @ c.k.mT * c.weights).mT @ d_o + _times(c.k @ d_s, c.until)
        x.put_d_kv(d_k, d_v, at, d_features, d_values)
        d_s = _times(d_s, c.fade) + _times(c.q, c.since).mT @ d_o
    d_state[span.states] = d_s


def read_all(x: Inputs, span: Span, state: Tensor, out: Tensor) -> None:
    """As `read_causal`, where every query reads every key."""
    s = state[span.states]
    for at in x.chunks(span.tokens):
        k, v = x.load_kv(at)
        s = s + k.mT @ v
    for at in x.chunks(x.queries(span)):
        out[:, :, at] = x.ungrouped(x.load_q(at) @ s)
    state[span.states] = s


def unread_all(
    x: Inputs, span: Span, state: Tensor, d_state: Tensor, d_out: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor
) -> None:
    """As `unread_causal`, where every query reads every key."""
    s, d_s = state[span.states], d_state[span.states]
    for at in x.chunks(span.tokens):
        k, v = x.load_kv(at)
        s = s + k.mT @ v
    for at in x.chunks(x.queries(span)):
        d_o = x.grouped(d_out[:, :, at])
        x.put_d_q(d_q, at, d_o @ s.mT)
        d_s = d_s + x.load_q(at).mT @ d_o
    for at in x.chunks(span.tokens):
        k, v = x.load_kv(at)
        x.put_d_kv(d_k, d_v, at, v @ d_s.mT, k @ d_s)
    d_state[span.states] = d_s


def _times(t: Tensor, factor: Tensor | None) -> Tensor:
    return t if factor is None else t * factor
