"""Which tiles of the score matrix a kernel walks: for each of its rows, or of its columns, those that are not empty."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnzoo.masks import Mask, Tile
from attnzoo.ops.softmax.triton.kept import Kept, upload
from attnzoo.ops.softmax.triton.patterns import classes_of

AT_ONCE = 1 << 20  # tiles that are judged in one step, to bound the memory that it takes


class Walk(NamedTuple):
    """The tiles that a kernel visits, in int32 tensors on the device.

    Those of row r for head h stand from `starts[c * rows + r]` up to `starts[c * rows + r + 1]` in `tiles`, where
    c is `head_class[h]`, or 0 without. Heads of one class see alike.
    """

    starts: Tensor  # [classes * rows + 1]
    partial: Tensor  # [classes * rows]: how many of a row's tiles, its first ones, need the mask; in the others all see
    tiles: Tensor  # numbers of the tiles along the other side, ascending among the partial and among the full ones
    head_class: Tensor | None  # [q_heads]; None where there is one class


def rows(mask: Mask, q_heads: int, q_len: int, k_len: int, block_q: int, block_k: int, device: torch.device) -> Walk:
    """For each tile of queries its tiles of keys, made once and kept; tiles that hang over an end count as partial.

    Raises:
        RuntimeError: if it has to be made while a CUDA graph is captured.
    """
    sizes = (q_len, k_len, block_q, block_k)
    return _WALKS.get((mask.text, sizes, "rows"), device, lambda: _walk(mask, sizes, device))


def columns(mask: Mask, q_heads: int, q_len: int, k_len: int, block_q: int, block_k: int, device: torch.device) -> Walk:
    """For each tile of keys its tiles of queries, as `rows`."""
    sizes = (q_len, k_len, block_q, block_k)
    return _WALKS.get((mask.text, sizes, "columns"), device, lambda: _walk(mask, sizes, device, turned=True))


_Sizes = tuple[int, int, int, int]  # q_len, k_len, block_q, block_k

_WALKS: Kept[Walk] = Kept(128)
_MAPS: Kept[list[np.ndarray]] = Kept(4)  # on the host: one direction leaves them to the other


def _walk(mask: Mask, sizes: _Sizes, device: torch.device, turned: bool = False) -> Walk:
    classes, class_of_head = classes_of(mask)
    maps = _MAPS.get((mask.text, sizes), torch.device("cpu"), lambda: [_kinds(each, sizes) for each in classes])
    walked = [_visited(part) for kinds in maps for part in _parts(np.ascontiguousarray(kinds.T) if turned else kinds)]
    counts = np.concatenate([np.zeros((0, 2), dtype=np.int64), *(counts for counts, _ in walked)])
    visited = np.concatenate([np.zeros(0, dtype=np.int64), *(tiles for _, tiles in walked)])
    ends = np.cumsum([0, *counts.sum(axis=1)])
    parts = [ends, counts[:, 0], visited, np.array(class_of_head)]
    starts, partial, tiles, head_class = _upload_all(parts, device)
    return Walk(starts, partial, tiles, head_class if len(classes) > 1 else None)


def _kinds(mask: Mask, sizes: _Sizes) -> np.ndarray:
    """The mask's block map, for kernels that look at the ends of q and k in partial tiles alone."""
    q_len, k_len, block_q, block_k = sizes
    positions = range(k_len - q_len, k_len)
    queries = [positions[at : at + block_q] for at in range(0, q_len, block_q)]
    keys = [range(at, min(at + block_k, k_len)) for at in range(0, k_len, block_k)]
    kinds = np.empty((len(queries), len(keys)), dtype=np.int8)
    step = max(1, AT_ONCE // max(1, len(keys)))
    for at in range(0, len(queries), step):
        kinds[at : at + step] = mask.tile_map(queries[at : at + step], keys).numpy()
    ends = ([kinds[-1:]] if q_len % block_q else []) + ([kinds[:, -1:]] if k_len % block_k else [])
    for end in ends:
        end[end == Tile.FULL] = Tile.PARTIAL
    return kinds


def _parts(kinds: np.ndarray) -> list[np.ndarray]:
    step = max(1, AT_ONCE // max(1, kinds.shape[1]))
    return [kinds[at : at + step] for at in range(0, len(kinds), step)]


def _visited(kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many tiles of each row are partial and how many full, [rows, 2], and their numbers, row after row."""
    planes = np.stack([kinds == Tile.PARTIAL, kinds == Tile.FULL], axis=1)  # [rows, 2, columns]
    return planes.sum(axis=-1, dtype=np.int32), np.flatnonzero(planes) % max(1, kinds.shape[1])


def _upload_all(parts: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """The parts on the device by one copy. Each starts at a multiple of 16 bytes, or kernels would compile for both."""
    starts = np.cumsum([0, *(-(-len(part) // 4) * 4 for part in parts)]).tolist()
    whole = np.zeros(starts[-1], dtype=np.int32)
    for start, part in zip(starts, parts, strict=False):
        whole[start : start + len(part)] = part
    sent = upload(whole, device)
    return [sent[start : start + len(part)] for start, part in zip(starts, parts, strict=False)]
