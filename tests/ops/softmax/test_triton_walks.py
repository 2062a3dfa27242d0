from __future__ import annotations

import pytest
import torch

from attnzoo.masks import (
    Blockwise,
    Causal,
    Dilated,
    Documents,
    Full,
    GlobalTokens,
    Mask,
    PerHead,
    RandomBlocks,
    SlidingWindow,
    big_bird,
)
from attnzoo.ops.softmax.triton.walks import Walk, columns, rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

MASKS = [
    Full(),
    Causal(),
    SlidingWindow(9, ahead=2),
    Dilated(3, 8),
    Documents([0, 5, 5, 31, 40]) & Causal(),
    SlidingWindow(4) | GlobalTokens((0, 33)),
    Blockwise(Causal(), 8) & RandomBlocks(2, 8, length=50),
    big_bird(8, random=1),
    PerHead([Causal(), SlidingWindow(3), Causal(), Full()]),
    PerHead([SlidingWindow(3), SlidingWindow(3)]),
    PerHead([GlobalTokens(3), Dilated(2, 16), Dilated(2, 16)]) & Documents([0, 20, 40]),
]
SHAPES = [
    (40, 40, 16, 8),
    (37, 50, 8, 16),
    (50, 23, 16, 16),
    (1, 33, 16, 8),
    (48, 48, 16, 16),
    (0, 7, 8, 8),
    (7, 0, 8, 8),
]


def tiles_of(walk: Walk, head: int, row: int, num_rows: int) -> tuple[list[int], list[int]]:
    """The partial and the full tiles of one row for one head."""
    at = (0 if walk.head_class is None else int(walk.head_class[head])) * num_rows + row
    tiles = walk.tiles[walk.starts[at] : walk.starts[at + 1]].tolist()
    partial = int(walk.partial[at])
    return tiles[:partial], tiles[partial:]


def assert_walks(walk: Walk, dense: torch.Tensor, block: int, across: int) -> None:
    """`walk` goes through every visible pair of `dense`, [heads, rows, columns], and calls only full tiles full."""
    heads, length, width = dense.shape
    num_rows, num_tiles = -(-length // block), -(-width // across)
    for head in range(heads):
        for row in range(num_rows):
            partial, full = tiles_of(walk, head, row, num_rows)
            assert partial == sorted(partial) and full == sorted(full)
            assert len({*partial, *full}) == len(partial) + len(full)
            for tile in range(num_tiles):
                seen = dense[head, row * block : (row + 1) * block, tile * across : (tile + 1) * across]
                if seen.any():
                    assert tile in partial or tile in full
                if tile in full:
                    assert seen.all() and seen.shape == (block, across)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_walks_go_through_all_that_is_visible(mask: Mask, shape: tuple[int, int, int, int]) -> None:
    q_len, k_len, block_q, block_k = shape
    heads = mask.heads or 2
    dense = mask.dense(q_len, k_len).expand(heads, q_len, k_len)
    assert_walks(rows(mask, heads, *shape, DEVICE), dense, block_q, block_k)
    assert_walks(columns(mask, heads, *shape, DEVICE), dense.transpose(1, 2), block_k, block_q)
