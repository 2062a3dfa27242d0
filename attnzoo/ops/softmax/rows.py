"""The walk of the tiled backend: which rows of tiles there are, and what one of them needs from memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.masks import Mask, Tile
from attnzoo.masks.cutting import chop
from attnzoo.ops.softmax.common import accumulation_dtype, mask_from_text

BLOCK = 128  # rows and columns of a tile, at most
SCORES = 1 << 24  # scores held at once, unless those of one head's row of tiles are more
TILES = 1 << 18  # tiles of the mask judged at once


class Row(NamedTuple):
    """One row of tiles: some queries, the keys that any of them may see, for some heads.

    Positions in the document are indices plus `q_shift` and `k_shift`.
    """

    heads: slice  # key/value heads
    q_heads: slice
    queries: slice  # with a step where the mask joins distant queries
    keys: list[slice]  # runs of keys, likewise
    q_shift: int
    k_shift: int
    mask: Mask | None  # None: no tile of the row needs the mask's elements
    number: int  # counts the rows, so that dropout can be replayed

    @property
    def group(self) -> int:
        """Query heads here for each key/value head."""
        return (self.q_heads.stop - self.q_heads.start) // (self.heads.stop - self.heads.start)


class Loaded(NamedTuple):
    """A row's tensors, in the accumulation dtype; what nobody sees is zeroed, so NaN in padding stays there."""

    q: Tensor  # [b, h, G * r, D]
    k: Tensor  # [b, h, n, D]
    v: Tensor  # [b, h, n, Dv]
    capped: Tensor  # [b, h, G, r, n], scaled and capped
    scores: Tensor  # the same with bias and ALiBi, not masked
    visible: Tensor | None  # broadcastable to the scores; None: all
    sees: Tensor | None  # [1|b, 1|h, 1|G, r, 1]: whether the query sees any key
    sink: Tensor | None  # [1, h, G, 1, 1]

    def exponentials(self) -> tuple[Tensor, Tensor, Tensor]:
        """The softmax before its division: exp(scores - top), 0 where hidden; its sum with the sink's share; and top.

        The backward computes them again rather than from the saved logsumexp: a row is whole here, and the rounding of
        a large logsumexp would be an error of every probability.
        """
        scores = self.scores if self.visible is None else self.scores.masked_fill(~self.visible, -torch.inf)
        top = scores.amax(-1, keepdim=True)
        if self.sink is not None:
            top = torch.maximum(top, self.sink)
        top = top.masked_fill(top == -torch.inf, 0)
        p = torch.exp(scores - top)
        total = p.sum(-1, keepdim=True)
        if self.sink is not None:
            total = total + torch.exp(self.sink - top)
        return p, total if self.sees is None else total.masked_fill(~self.sees, 1), top


class Inputs(NamedTuple):
    """The operator's arguments, with the steps that forward and backward share."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    dense: Tensor | None
    key_lengths: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    seed: Tensor | None
    mask: str
    scale: float
    softcap: float
    dropout_p: float
    bias: Tensor | None = None  # [1|B, 1|Hq, 1|Sq, 1|Sk]
    slopes: Tensor | None = None  # [1|B, Hq]

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.q.shape[1] // self.k.shape[1]

    def load(self, row: Row) -> Loaded:
        """Read one row of tiles and compute its scores."""
        dtype = accumulation_dtype(self.q.dtype)
        q = self.q[:, row.q_heads, row.queries].to(dtype)
        shape = (row.group, q.shape[2])
        q = q.unflatten(1, (-1, row.group)).flatten(2, 3)
        k, v = (torch.cat([t[:, row.heads, run] for run in row.keys], dim=2).to(dtype) for t in (self.k, self.v))
        bias = self._bias(row)
        visible, sees = self._visible(row, bias), None
        if visible is not None:
            sees = visible.any(-1, keepdim=True)
            q = q.unflatten(2, shape).masked_fill(~sees, 0).flatten(2, 3)
            unseen = ~visible.flatten(2, 3).any(2)[..., None]
            k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
        scores = (q @ k.mT).mul_(self.scale).unflatten(2, shape)
        if self.softcap:
            scores = torch.tanh(scores.div_(self.softcap)).mul_(self.softcap)
        capped = scores
        if bias is not None:
            scores = scores + bias.to(dtype)
        if self.slopes is not None:
            slopes = self.slopes[:, row.q_heads].to(dtype).reshape(self.slopes.shape[0], -1, row.group, 1, 1)
            scores = scores - slopes * self._distances(row)
        sink = None
        if self.sinks is not None:
            sink = self.sinks[row.q_heads].to(dtype).reshape(1, -1, row.group, 1, 1)
        return Loaded(q, k, v, capped, scores, visible, sees, sink)

    def drop(self, p: Tensor, row: Row) -> Tensor:
        """Dropout on a row's probabilities, the same each time it is asked for the same row."""
        if self.seed is None:
            return p
        generator = torch.Generator(p.device).manual_seed(int(self.seed) + row.number)
        keep = torch.rand(p.shape, generator=generator, device=p.device) >= self.dropout_p
        return p * keep / (1 - self.dropout_p)

    def add(self, total: Tensor, row: Row, part: Tensor) -> None:
        """Add a row's gradient for its keys `[b, h, n, D]` where those keys stand."""
        sizes = [_size(run) for run in row.keys]
        for run, run_part in zip(row.keys, part.split(sizes, dim=2), strict=True):
            total[:, row.heads, run] += run_part

    def add_bias(self, total: Tensor, row: Row, part: Tensor) -> None:
        """Add a row's gradient of its scores `[b, h, G, r, n]` to that of the bias, of the bias's shape."""
        spread = [size for size, one in enumerate(total.shape) if one == 1]
        part = part.flatten(1, 2)
        part = part.sum([d for d in spread if d < 3], keepdim=True) if any(d < 3 for d in spread) else part
        where = (
            slice(None),
            *(slice(None) if total.shape[d] == 1 else s for d, s in ((1, row.q_heads), (2, row.queries))),
        )
        if total.shape[3] == 1:
            total[where] += part.sum(3, keepdim=True)
            return
        for run, run_part in zip(row.keys, part.split([_size(run) for run in row.keys], dim=3), strict=True):
            total[(*where, run)] += run_part

    def _bias(self, row: Row) -> Tensor | None:
        """The row's part of the bias, `[1|b, 1|h, 1|G, 1|r, 1|n]`, in the bias's dtype."""
        if self.bias is None:
            return None
        bias = self.bias if self.bias.shape[1] == 1 else self.bias[:, row.q_heads]
        bias = bias if bias.shape[2] == 1 else bias[:, :, row.queries]
        if bias.shape[3] > 1:
            bias = torch.cat([bias[..., run] for run in row.keys], dim=3)
        return bias[:, None] if bias.shape[1] == 1 else bias.unflatten(1, (-1, row.group))

    def _distances(self, row: Row) -> Tensor:
        """|i - j| of the row's queries and keys, `[r, n]`."""
        i, j = self._positions(row)
        return (i[:, None] - j[None, :]).abs()

    def _positions(self, row: Row) -> tuple[Tensor, Tensor]:
        """Where the row's queries and keys stand in their document."""
        device = self.q.device
        return _indices([row.queries], device) + row.q_shift, _indices(row.keys, device) + row.k_shift

    def _visible(self, row: Row, bias: Tensor | None) -> Tensor | None:
        """The row's elements of the mask, `[1|b, 1|h, 1|G, r, n]`; None where everything is visible."""
        device = self.q.device
        visible: Tensor | None = None
        if self.dense is not None:
            visible = self.dense.expand(*self.q.shape[:3], self.k.shape[2])[:, row.q_heads, row.queries]
            visible = visible[..., row.keys[0]].unflatten(1, (-1, row.group))
        elif row.mask is not None:
            i, j = self._positions(row)
            visible = row.mask.visible(i[:, None], j[None, :])[None, None, None]
        if self.key_lengths is not None:
            j = _indices(row.keys, device)
            real = (j < self.key_lengths[:, None]).reshape(-1, 1, 1, 1, j.shape[0])
            visible = real if visible is None else visible & real
        if bias is not None:
            shown = (bias > -torch.inf).expand(*bias.shape[:3], *self._sizes(row))
            visible = shown if visible is None else visible & shown
        return visible

    def _sizes(self, row: Row) -> tuple[int, int]:
        return _size(row.queries), sum(_size(run) for run in row.keys)


def rows_of_tiles(x: Inputs) -> Iterator[Row]:
    """All rows of tiles that hold anything visible: per mask, document, stretch of queries and set of heads."""
    number = 0
    for q_heads, mask in _masks(x):
        for queries, keys in _documents(x):
            shift = len(keys) - len(queries)
            for stretch, runs, partial in _walk(mask, len(queries), len(keys)):
                n = sum(len(run) for run in runs)
                most = max(1, SCORES // max(1, x.q.shape[0] * x.group * len(stretch) * n))
                for heads, some_q_heads in _heads(q_heads, x.group, most):
                    yield Row(
                        heads=heads,
                        q_heads=some_q_heads,
                        queries=_slice(stretch, queries.start - shift),
                        keys=[_slice(run, keys.start) for run in runs],
                        q_shift=shift - queries.start,
                        k_shift=-keys.start,
                        mask=mask if partial else None,
                        number=number,
                    )
                    number += 1


def _masks(x: Inputs) -> Iterator[tuple[range, Mask | None]]:
    """The mask of each run of query heads; None: the dense one."""
    every = range(x.q.shape[1])
    mask = None if x.dense is not None else mask_from_text(x.mask)
    if mask is None or mask.heads is None:
        yield every, mask
        return
    for one, heads in groupby(every, mask.head):
        numbers = list(heads)
        yield range(numbers[0], numbers[-1] + 1), one


def _heads(q_heads: range, group: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Key/value heads, `most` at once, and their query heads out of `q_heads`, an equal number for each."""
    if q_heads.start % group or q_heads.stop % group:  # cuts through groups: one at a time
        for head in range(q_heads.start // group, (q_heads.stop - 1) // group + 1):
            first, end = max(q_heads.start, head * group), min(q_heads.stop, (head + 1) * group)
            yield slice(head, head + 1), slice(first, end)
        return
    for head in range(q_heads.start // group, q_heads.stop // group, most):
        end = min(head + most, q_heads.stop // group)
        yield slice(head, end), slice(head * group, end * group)


def _documents(x: Inputs) -> Iterator[tuple[range, range]]:
    """The queries and keys that belong together: all of them, or document by document."""
    if x.cu_q is None or x.cu_k is None:
        yield range(x.q.shape[2]), range(x.k.shape[2])
        return
    q_ends, k_ends = x.cu_q.tolist(), x.cu_k.tolist()
    for d in range(len(q_ends) - 1):
        yield range(q_ends[d], q_ends[d + 1]), range(k_ends[d], k_ends[d + 1])


def _walk(mask: Mask | None, q_len: int, k_len: int) -> Iterator[tuple[range, list[range], bool]]:
    """For each stretch of queries: its positions, the runs of keys in tiles not empty, whether any is partial."""
    if q_len == 0 or k_len == 0:
        return
    stretches, keys = _tiles(mask, range(k_len - q_len, k_len)), _tiles(mask, range(k_len))
    if mask is None:
        yield from ((stretch, [range(k_len)], True) for stretch in stretches)
        return
    at_once = max(1, TILES // len(keys))
    for first in range(0, len(stretches), at_once):
        some = stretches[first : first + at_once]
        for stretch, tiles in zip(some, mask.tile_map(some, keys), strict=True):
            seen = tiles.nonzero().flatten().tolist()
            if seen:
                yield stretch, _joined([keys[column] for column in seen]), bool((tiles == Tile.PARTIAL).any())


def _tiles(mask: Mask | None, positions: range) -> list[range]:
    """The positions as one side of the tiles: cut as the mask wants it, and no longer than a tile."""
    pieces = [positions] if mask is None else mask.cut(positions)
    return [tile for piece in pieces for tile in chop(piece, BLOCK)]


def _joined(ranges: list[range]) -> list[range]:
    """Ranges one after another, those that continue the one before joined to it."""
    out = ranges[:1]
    for r in ranges[1:]:
        if r.step == out[-1].step and r[0] == out[-1][-1] + r.step:
            out[-1] = range(out[-1][0], r[-1] + 1, r.step)
        else:
            out.append(r)
    return out


def _slice(positions: range, shift: int) -> slice:
    return slice(positions[0] + shift, positions[-1] + shift + 1, positions.step)


def _size(run: slice) -> int:
    return len(range(run.start, run.stop, run.step))


def _indices(runs: list[slice], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(run.start, run.stop, run.step, device=device) for run in runs])
