"""Decoding through `ops.attention`: any mask, any device, gradients; the cache's view may be a copy of it all."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.masks import Full, Mask, SlidingWindow
from attnzoo.ops.decoding.common import Call, check_last
from attnzoo.ops.decoding.reach import is_relative
from attnzoo.ops.softmax import attention

_FEW_QUERIES = 16  # up to here a mask of [B, 1, Sq, n] is small beside the keys


class _Seen(NamedTuple):
    """The view of a cache, in its own columns: row b's first key stands in column 0, whatever its position."""

    k: Tensor  # [B, Hk, n, D]
    v: Tensor
    lengths: Tensor | None  # [B], columns that are filled; None: all, in every row
    first: int | Tensor  # position of column 0, one for all or [B]; 0 where the mask does not ask


def reasons(call: Call) -> list[str]:
    """Why this backend cannot run the call: it always can."""
    return []


def run(call: Call) -> Tensor:
    """The result, `[B, Hq, Sq, Dv]`."""
    q, cache, mask, first = call.q, call.cache, call.mask, call.shift
    k, v = cache.view()
    alike = cache.uniform and isinstance(first, int)
    options = {"scale": call.scale, "softcap": call.softcap, "sinks": call.sinks}
    start = call.starts - first
    shifted = not ((isinstance(first, int) and first == 0) or is_relative(mask, call.stored.prefix))
    seen = _Seen(k, v, None if alike else cache.lengths - first, first if shifted else 0)
    if isinstance(start, int) and not shifted:
        return _aligned(q, seen, start, mask, options)
    starts = start if isinstance(start, Tensor) else torch.full(q.shape[:1], start, device=q.device)
    q_len = q.shape[2]
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
        check_last(start, q_len, length)
        real, at = length - start, slice(row, row + 1)
        keys, values = seen.k[at, :, :length], seen.v[at, :, :length]
        one = attention(q[at, :, :real], keys, values, mask=mask, **options)
        out.append(F.pad(one, (0, 0, 0, q_len - real)))
    return torch.cat(out)
