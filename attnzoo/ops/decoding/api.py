"""Attention of the newest tokens over a cache of keys and values, of rows of equal or different length."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.masks import Full, Mask, SlidingWindow
from attnzoo.ops.decoding.reach import is_relative, reach
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

    @property
    def first(self) -> int | Tensor: ...

    @property
    def kept(self) -> int | None: ...

    def view(self) -> tuple[Tensor, Tensor]: ...


class _Seen(NamedTuple):
    """The view of a cache, in its own columns: row b's first key stands in column 0, whatever its position."""

    k: Tensor  # [B, Hk, n, D]
    v: Tensor
    lengths: Tensor | None  # [B], columns that are filled; None: all, in every row
    first: int | Tensor  # position of column 0, one for all or [B]


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
        cache: keys `[B, Hk, n, D]` and values `[B, Hk, n, Dv]` with `Hq % Hk == 0`. After a chunk into a rolling cache,
            what its `extend` returned.
        mask: by absolute positions; None: every key of the row is visible, as in `attention`.
        scale: of the scores; None: `D ** -0.5`.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: `[Hq]`, a logit a head that takes probability and gives no value.
        starts: position of each row's first query, one for all or `[B]` int64: the lengths before the append. None:
            the lengths less Sq. Needed where an append was padded, and then queries past a row's end give 0.

    Returns:
        `[B, Hq, Sq, Dv]`; a query that sees no key gives 0.

    Raises:
        ValueError: for shapes that do not fit the cache, queries that are not the last tokens of the cache, or a mask
            that reaches further back than the cache has kept tokens.
    """
    k, v = cache.view()
    mask = Full() if mask is None else mask
    _check(q, k, starts)
    _check_reach(mask, q.shape[2], cache)
    q_len, first = q.shape[2], cache.first
    if starts is None:
        starts = cache.length - q_len if cache.uniform else cache.lengths - q_len
    if isinstance(starts, int):
        _check_last(starts, q_len, cache.length)
    alike = cache.uniform and isinstance(first, int)
    seen = _Seen(k, v, None if alike else cache.lengths - first, first)
    options = {"scale": scale, "softcap": softcap, "sinks": sinks}
    start = starts - first
    shifted = not ((isinstance(first, int) and first == 0) or is_relative(mask))
    if isinstance(start, int) and not shifted:
        return _aligned(q, seen, start, mask, options)
    starts = start if isinstance(start, Tensor) else torch.full(q.shape[:1], start, device=q.device)
    if q_len <= _FEW_QUERIES:
        return _masked(q, seen, starts, mask, options)
    if shifted:  # `attention` counts positions from the first key
        parts = zip(q.split(_FEW_QUERIES, dim=2), range(0, q_len, _FEW_QUERIES), strict=True)
        return torch.cat([_masked(part, seen, starts + at, mask, options) for part, at in parts], dim=2)
    return _row_by_row(q, seen, starts, mask, options)


def _aligned(q: Tensor, seen: _Seen, start: int, mask: Mask, options: dict[str, Any]) -> Tensor:
    """All rows start at one column: the queries are the last ones of the keys, as `attention` aligns them."""
    k, v, lengths, _ = seen
    padding = start + q.shape[2] - k.shape[2]  # queries past the end of every row
    q = q[:, :, : q.shape[2] - padding]
    if lengths is None:
        if q.shape[2] == 1 and isinstance(mask, SlidingWindow):  # only the last few keys: no mask is needed then
            nearest = max(k.shape[2] - mask.window, 0)
            k, v, mask = k[:, :, nearest:], v[:, :, nearest:], Full()
        out = attention(q, k, v, mask=mask, **options)
    else:
        out = attention(q, k, v, mask=mask, key_lengths=lengths, **options)
        past = start + torch.arange(q.shape[2], device=q.device) >= lengths[:, None]  # [B, Sq]
        out = out.masked_fill(past[:, None, :, None], 0)
    return F.pad(out, (0, 0, 0, padding)) if padding else out


def _masked(q: Tensor, seen: _Seen, starts: Tensor, mask: Mask, options: dict[str, Any]) -> Tensor:
    """Few queries at different columns: one call with the mask written out, `[B, 1 or Hq, Sq, n]`."""
    k, v, lengths, first = seen
    i = starts[:, None, None, None] + torch.arange(q.shape[2], device=q.device)[:, None]  # [B, 1, Sq, 1]
    j = torch.arange(k.shape[2], device=q.device)
    shift = first[:, None, None, None] if isinstance(first, Tensor) else first
    visible = mask.visible(i + shift, j + shift)
    ends = k.shape[2] if lengths is None else lengths[:, None, None, None]
    return attention(q, k, v, mask=visible & (j < ends) & (i < ends), **options)


def _row_by_row(q: Tensor, seen: _Seen, starts: Tensor, mask: Mask, options: dict[str, Any]) -> Tensor:
    """Many queries at different columns: a written mask would be quadratic, so each row goes alone."""
    q_len = q.shape[2]
    lengths = torch.full_like(starts, seen.k.shape[2]) if seen.lengths is None else seen.lengths
    out = []
    for row, (start, length) in enumerate(torch.stack([starts, lengths], dim=1).tolist()):
        _check_last(start, q_len, length)
        real, at = length - start, slice(row, row + 1)
        keys, values = seen.k[at, :, :length], seen.v[at, :, :length]
        one = attention(q[at, :, :real], keys, values, mask=mask, **options)
        out.append(F.pad(one, (0, 0, 0, q_len - real)))
    return torch.cat(out)


def _check_reach(mask: Mask, q_len: int, cache: KeyValues) -> None:
    kept = cache.kept
    if kept is None or cache.length <= kept:
        return
    far = reach(mask)
    if far is None or q_len - 1 + far > kept:
        sees = "any key before it" if far is None else f"{far} keys up to its own"
        raise ValueError(
            f"mask {mask} lets a query see {sees}; with {q_len} queries the cache would have to hold more than "
            f"the last {kept} of {cache.length} tokens"
        )


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
