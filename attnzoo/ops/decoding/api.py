"""Attention of the newest tokens over a cache of keys and values, of rows of equal or different length."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.masks import Full, Mask, SlidingWindow
from attnzoo.ops.softmax import attention

_FEW_QUERIES = 16  # up to here a mask of [B, 1, Sq, n] is small beside the keys


class KeyValues(Protocol):
    """What `decode` needs of a cache; every cache in `attnzoo.caches` has it."""

    @property
    def length(self) -> int: ...

    @property
    def uniform(self) -> bool: ...

    @property
    def lengths(self) -> Tensor: ...

    def row_lengths(self) -> list[int]: ...

    def view(self) -> tuple[Tensor, Tensor]: ...


def decode(
    q: Tensor,
    cache: KeyValues,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    starts: int | Tensor | None = None,
) -> Tensor:
    """Attend from the tokens appended last to everything in the cache; their own keys are in it already.

    Row b's query i stands at position `starts[b] + i`. What lies past a row's own length is never read into a result,
    whatever it holds. Memory is linear in the length of the cache.

    Args:
        q: `[B, Hq, Sq, D]`.
        cache: keys `[B, Hk, n, D]` and values `[B, Hk, n, Dv]` with `Hq % Hk == 0`.
        mask: by absolute positions; None: every key of the row is visible, as in `attention`.
        scale: of the scores; None: `D ** -0.5`.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: `[Hq]`, a logit a head that takes probability and gives no value.
        starts: position of each row's first query, one for all or `[B]` int64: the lengths before the append. None:
            the lengths less Sq. Needed where an append was padded, and then queries past a row's end give 0.

    Returns:
        `[B, Hq, Sq, Dv]`; a query that sees no key gives 0.

    Raises:
        ValueError: for shapes that do not fit the cache, or queries that are not the last tokens of the cache.
    """
    k, v = cache.view()
    _check(q, k, starts)
    q_len, k_len = q.shape[2], k.shape[2]
    mask = Full() if mask is None else mask
    if starts is None:
        starts = k_len - q_len if cache.uniform else cache.lengths - q_len
    if isinstance(starts, int):
        _check_last(starts, q_len, k_len)
        return _aligned(q, k, v, cache, starts, mask, scale, softcap, sinks)
    if q_len <= _FEW_QUERIES:
        return _masked(q, k, v, cache, starts, mask, scale, softcap, sinks)
    return _row_by_row(q, k, v, cache, starts, mask, scale, softcap, sinks)


def _aligned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KeyValues,
    start: int,
    mask: Mask,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """All rows start at one position: the queries are the last ones of the keys, as `attention` aligns them."""
    padding = start + q.shape[2] - k.shape[2]  # queries past the end of every row
    q = q[:, :, : q.shape[2] - padding]
    if cache.uniform:
        if q.shape[2] == 1 and isinstance(mask, SlidingWindow):  # only the last few keys: no mask is needed then
            first = max(k.shape[2] - mask.window, 0)
            k, v, mask = k[:, :, first:], v[:, :, first:], Full()
        out = attention(q, k, v, mask=mask, scale=scale, softcap=softcap, sinks=sinks)
    else:
        lengths = cache.lengths
        out = attention(q, k, v, mask=mask, scale=scale, softcap=softcap, sinks=sinks, key_lengths=lengths)
        past = start + torch.arange(q.shape[2], device=q.device) >= lengths[:, None]  # [B, Sq]
        out = out.masked_fill(past[:, None, :, None], 0)
    return F.pad(out, (0, 0, 0, padding)) if padding else out


def _masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KeyValues,
    starts: Tensor,
    mask: Mask,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Few queries at different positions: one call with the mask written out, `[B, 1, Sq, n]`."""
    lengths = cache.lengths[:, None, None, None]
    i = starts[:, None, None, None] + torch.arange(q.shape[2], device=q.device)[:, None]  # [B, 1, Sq, 1]
    j = torch.arange(k.shape[2], device=q.device)
    visible = mask.visible(i, j) & (j < lengths) & (i < lengths)
    return attention(q, k, v, mask=visible, scale=scale, softcap=softcap, sinks=sinks)


def _row_by_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KeyValues,
    starts: Tensor,
    mask: Mask,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Many queries at different positions: a written mask would be quadratic, so each row goes alone."""
    q_len = q.shape[2]
    out = []
    for row, (start, length) in enumerate(zip(starts.tolist(), cache.row_lengths(), strict=True)):
        _check_last(start, q_len, length)
        real, at = length - start, slice(row, row + 1)
        keys, values = k[at, :, :length], v[at, :, :length]
        one = attention(q[at, :, :real], keys, values, mask=mask, scale=scale, softcap=softcap, sinks=sinks)
        out.append(F.pad(one, (0, 0, 0, q_len - real)))
    return torch.cat(out)


def _check(q: Tensor, k: Tensor, starts: int | Tensor | None) -> None:
    batch, heads, _, dim = k.shape
    if q.dim() != 4 or q.shape[0] != batch or q.shape[1] % heads or q.shape[3] != dim:
        raise ValueError(
            f"q has shape {list(q.shape)}; this cache takes [{batch}, a multiple of {heads}, queries, {dim}]"
        )
    if isinstance(starts, Tensor) and starts.shape != (batch,):
        raise ValueError(f"starts has shape {list(starts.shape)}; it must be [{batch}]")


def _check_last(start: int, q_len: int, length: int) -> None:
    if not length - q_len <= start <= length:
        raise ValueError(
            f"starts holds {start}; {q_len} queries at the end of a row of {length} tokens "
            f"start from {length - q_len} to {length}"
        )
