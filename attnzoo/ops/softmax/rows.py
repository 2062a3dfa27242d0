"""The walk of the tiled backend: which rows of tiles there are, and what one of them needs from memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.masks import Mask, Tile
from attnzoo.ops.softmax.common import accumulation_dtype, mask_from_text

BLOCK = 128  # rows and columns of a tile
SCORES = 1 << 24  # scores held at once, unless those of one head's row of tiles are more


class Row(NamedTuple):
    """One row of tiles: some queries, the keys that any of them may see, for some heads."""

    b: slice
    heads: slice  # key/value heads
    q_heads: slice
    queries: slice
    keys: list[slice]  # runs of keys, ascending
    first_query: int  # the position of the first query, and of each run's first key, in their document
    first_keys: list[int]
    whole: bool  # no tile of the row needs the mask's elements
    number: int  # counts the rows, so that dropout can be replayed


class Loaded(NamedTuple):
    """A row's tensors, in the accumulation dtype; what nobody sees is zeroed, so NaN in padding stays there."""

    q: Tensor  # [b, h, G * r, D]
    k: Tensor  # [b, h, n, D]
    v: Tensor  # [b, h, n, Dv]
    scores: Tensor  # [b, h, G, r, n], scaled and capped, not masked
    visible: Tensor | None  # broadcastable to the scores; None: all
    sees: Tensor | None  # [1|b, 1|h, 1|G, r, 1]: whether the query sees any key
    sink: Tensor | None  # [1, h, G, 1, 1]

    def masked(self, scores: Tensor, value: float) -> Tensor:
        return scores if self.visible is None else scores.masked_fill(~self.visible, value)


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

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    def load(self, row: Row) -> Loaded:
        """Read one row of tiles and compute its scores."""
        dtype = accumulation_dtype(self.q.dtype)
        q = self.q[row.b, row.q_heads, row.queries].to(dtype)
        shape = (self.group, q.shape[2])
        q = q.unflatten(1, (-1, self.group)).flatten(2, 3)
        k, v = (torch.cat([t[row.b, row.heads, run] for run in row.keys], dim=2).to(dtype) for t in (self.k, self.v))
        visible, sees = self._visible(row), None
        if visible is not None:
            sees = visible.any(-1, keepdim=True)
            q = q.unflatten(2, shape).masked_fill(~sees, 0).flatten(2, 3)
            unseen = ~visible.flatten(2, 3).any(2)[..., None]
            k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
        scores = (q @ k.mT).mul_(self.scale).unflatten(2, shape)
        if self.softcap:
            scores = torch.tanh(scores.div_(self.softcap)).mul_(self.softcap)
        sink = None
        if self.sinks is not None:
            sink = self.sinks[row.q_heads].to(dtype).reshape(1, -1, self.group, 1, 1)
        return Loaded(q, k, v, scores, visible, sees, sink)

    def drop(self, p: Tensor, row: Row) -> Tensor:
        """Dropout on a row's probabilities, the same each time it is asked for the same row."""
        if self.seed is None:
            return p
        generator = torch.Generator(p.device).manual_seed(int(self.seed) + row.number)
        keep = torch.rand(p.shape, generator=generator, device=p.device) >= self.dropout_p
        return p * keep / (1 - self.dropout_p)

    def add(self, total: Tensor, row: Row, part: Tensor) -> None:
        """Add a row's gradient for its keys `[b, h, n, D]` where those keys stand."""
        at = 0
        for run in row.keys:
            size = run.stop - run.start
            total[row.b, row.heads, run] += part[:, :, at : at + size]
            at += size

    def _visible(self, row: Row) -> Tensor | None:
        """The row's elements of the mask, `[1|b, 1|h, 1|G, r, n]`; None where everything is visible."""
        device = self.q.device
        if self.dense is not None:
            visible = self.dense.expand(*self.q.shape[:3], self.k.shape[2])[row.b, row.q_heads, row.queries]
            visible = visible[..., row.keys[0]].unflatten(1, (-1, self.group))
        elif row.whole and self.key_lengths is None:
            return None
        else:
            size = row.queries.stop - row.queries.start
            i = torch.arange(row.first_query, row.first_query + size, device=device)
            starts = zip(row.first_keys, row.keys, strict=True)
            j = torch.cat([torch.arange(at, at + run.stop - run.start, device=device) for at, run in starts])
            visible = mask_from_text(self.mask).visible(i[:, None], j[None, :])[None, None, None]
        if self.key_lengths is not None:
            j = torch.cat([torch.arange(run.start, run.stop, device=device) for run in row.keys])
            visible = visible & (j < self.key_lengths[row.b, None]).reshape(-1, 1, 1, 1, j.shape[0])
        return visible


def rows_of_tiles(x: Inputs) -> Iterator[Row]:
    """All rows of tiles that hold anything visible: per document, per stretch of queries, per set of heads."""
    mask = None if x.dense is not None else mask_from_text(x.mask)
    number = 0
    for queries, keys in _documents(x):
        for start, stop, runs, whole in _walk(mask, queries.stop - queries.start, keys.stop - keys.start):
            n = sum(run.stop - run.start for run in runs)
            step = max(1, SCORES // max(1, x.q.shape[0] * x.group * (stop - start) * n))
            for head in range(0, x.k.shape[1], step):
                heads = slice(head, min(head + step, x.k.shape[1]))
                yield Row(
                    b=slice(None),
                    heads=heads,
                    q_heads=slice(heads.start * x.group, heads.stop * x.group),
                    queries=slice(queries.start + start, queries.start + stop),
                    keys=[slice(keys.start + run.start, keys.start + run.stop) for run in runs],
                    first_query=start + (keys.stop - keys.start) - (queries.stop - queries.start),
                    first_keys=[run.start for run in runs],
                    whole=whole,
                    number=number,
                )
                number += 1


def _documents(x: Inputs) -> Iterator[tuple[slice, slice]]:
    """The queries and keys that belong together: all of them, or document by document."""
    if x.cu_q is None or x.cu_k is None:
        yield slice(0, x.q.shape[2]), slice(0, x.k.shape[2])
        return
    q_ends, k_ends = x.cu_q.tolist(), x.cu_k.tolist()
    for d in range(len(q_ends) - 1):
        yield slice(q_ends[d], q_ends[d + 1]), slice(k_ends[d], k_ends[d + 1])


def _walk(mask: Mask | None, q_len: int, k_len: int) -> Iterator[tuple[int, int, list[slice], bool]]:
    """For each stretch of queries: its bounds, the runs of keys in tiles that are not empty, whether all are full."""
    if q_len == 0 or k_len == 0:
        return
    tiles = None if mask is None else mask.block_map(q_len, k_len, BLOCK, BLOCK).tolist()
    for index, start in enumerate(range(0, q_len, BLOCK)):
        row = [Tile.PARTIAL] * -(-k_len // BLOCK) if tiles is None else tiles[index]
        runs: list[slice] = []
        for column, tile in enumerate(row):
            if tile == Tile.EMPTY:
                continue
            at, end = column * BLOCK, min((column + 1) * BLOCK, k_len)
            if runs and runs[-1].stop == at:
                runs[-1] = slice(runs[-1].start, end)
            else:
                runs.append(slice(at, end))
        if runs:
            whole = all(tile != Tile.PARTIAL for tile in row)
            yield start, min(start + BLOCK, q_len), runs, whole
