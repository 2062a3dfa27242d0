"""Which tiles of the score matrix a kernel walks: for each of its rows, or of its columns, those that are not empty."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnzoo.masks import Mask, Tile
from attnzoo.ops.softmax.triton.kept import Kept, upload


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
    return _WALKS.get((mask.text, sizes, "rows"), device, lambda: _walk(mask, sizes, device, False))


def columns(mask: Mask, q_heads: int, q_len: int, k_len: int, block_q: int, block_k: int, device: torch.device) -> Walk:
    """For each tile of keys its tiles of queries, as `rows`."""
    sizes = (q_len, k_len, block_q, block_k)
    return _WALKS.get((mask.text, sizes, "columns"), device, lambda: _walk(mask, sizes, device, True))


_Sizes = tuple[int, int, int, int]

_HOST = torch.device("cpu")
_WALKS: Kept[Walk] = Kept(128)
_MAPS: Kept[np.ndarray] = Kept(8)  # on the host; a forward leaves them to its backward


def _walk(mask: Mask, sizes: _Sizes, device: torch.device, across: bool) -> Walk:
    classes = list(dict.fromkeys(mask.head(number) for number in range(mask.heads or 1)))
    kinds = _MAPS.get((mask.text, sizes), _HOST, lambda: np.stack([_kinds(each, sizes) for each in classes]))
    if across:
        kinds = kinds.transpose(0, 2, 1)
    planes = np.stack([kinds == Tile.PARTIAL, kinds == Tile.FULL], axis=2)  # [classes, rows, 2, columns]
    counts = np.count_nonzero(planes, axis=-1)
    starts = np.concatenate([[0], np.cumsum(counts.sum(-1))])
    tiles = np.flatnonzero(planes) % max(1, kinds.shape[2])
    number = {each: number for number, each in enumerate(classes)}
    head_class = np.array([number[mask.head(head)] for head in range(mask.heads or 0)])
    parts = _upload_all([starts, counts[..., 0].ravel(), tiles, head_class], device)
    return Walk(parts[0], parts[1], parts[2], parts[3] if len(classes) > 1 else None)


def _kinds(mask: Mask, sizes: _Sizes) -> np.ndarray:
    """The mask's block map, for kernels that check the ends of q and k in partial tiles alone."""
    q_len, k_len, block_q, block_k = sizes
    kinds = mask.block_map(*sizes).clone().numpy()
    ends = [kinds[-1:]] if q_len % block_q else []
    ends += [kinds[:, -1:]] if k_len % block_k else []
    for end in ends:
        end[end == Tile.FULL] = Tile.PARTIAL
    return kinds


def _upload_all(parts: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """The parts on the device by one copy. Each starts at a multiple of 16 bytes, or kernels would compile for both."""
    places = [-(-len(part) // 4) * 4 for part in parts]
    starts = np.cumsum([0, *places])
    whole = np.zeros(int(starts[-1]), dtype=np.int32)
    for start, part in zip(starts, parts, strict=False):
        whole[start : start + len(part)] = part
    sent = upload(whole, device)
    return [sent[start : start + len(part)] for start, part in zip(starts.tolist(), parts, strict=False)]
