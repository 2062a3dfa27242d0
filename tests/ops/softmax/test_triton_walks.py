"""The tiles that kernels walk, against the masks written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
from attnzoo.ops.softmax.triton import walks
from attnzoo.ops.softmax.triton.kept import Kept
from attnzoo.ops.softmax.triton.walks import Walk, columns, rows

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

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
    tiles = walk.tiles[int(walk.starts[at]) : int(walk.starts[at + 1])].tolist()
    partial = int(walk.partial[at])
    return tiles[:partial], tiles[partial:]


def assert_walks(walk: Walk, dense: torch.Tensor, block: int, across: int) -> None:
    """`walk` goes through every visible pair of `dense`, [heads, rows, columns], and calls only full tiles full."""
    heads, length, width = dense.shape
    num_rows, num_tiles = -(-length // block), -(-width // across)
    assert walk.tiles.numel() == int(walk.starts[-1])
    for head in range(heads):
        for row in range(num_rows):
            partial, full = tiles_of(walk, head, row, num_rows)
            assert partial == sorted(partial) and full == sorted(full)
            assert len({*partial, *full}) == len(partial) + len(full)
            assert {*partial, *full} <= set(range(num_tiles))
            for tile in range(num_tiles):
                seen = dense[head, row * block : (row + 1) * block, tile * across : (tile + 1) * across]
                if seen.any():
                    assert tile in partial or tile in full
                if tile in full:
                    assert seen.all() and seen.shape == (block, across)


def assert_both_walk(mask: Mask, shape: tuple[int, int, int, int]) -> None:
    q_len, k_len, block_q, block_k = shape
    heads = mask.heads or 2
    dense = mask.dense(q_len, k_len).expand(heads, q_len, k_len)
    assert_walks(rows(mask, heads, *shape, DEVICE), dense, block_q, block_k)
    assert_walks(columns(mask, heads, *shape, DEVICE), dense.transpose(1, 2), block_k, block_q)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_walks_go_through_all_that_is_visible(mask: Mask, shape: tuple[int, int, int, int]) -> None:
    assert_both_walk(mask, shape)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(MASKS[:8]), min_size=1, max_size=4).map(PerHead),
    st.sampled_from(MASKS[:8]),
    st.booleans(),
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([4, 8, 16]), st.sampled_from([4, 8, 16])),
)
def test_walks_of_any_combination_go_through_all_that_is_visible(by_head, mask, both, shape) -> None:
    assert_both_walk(by_head & mask if both else by_head | mask, shape)


def test_a_mask_whose_tiles_are_known_exactly_is_walked_exactly() -> None:
    walk = rows(Causal(), 4, 64, 64, 16, 16, DEVICE)
    assert walk.starts.tolist() == [0, 1, 3, 6, 10]
    assert walk.partial.tolist() == [1, 1, 1, 1]
    assert walk.tiles.tolist() == [0, 1, 0, 2, 0, 1, 3, 0, 1, 2]
    assert walk.head_class is None
    walk = columns(SlidingWindow(17), 4, 64, 64, 16, 16, DEVICE)
    assert [tiles_of(walk, 0, row, 4) for row in range(4)] == [([0, 1], []), ([1, 2], []), ([2, 3], []), ([3], [])]


def test_heads_that_see_alike_share_their_walks() -> None:
    mask = PerHead([Causal(), SlidingWindow(3), Causal(), Full()])
    walk = rows(mask, 4, 64, 64, 16, 16, DEVICE)
    assert walk.head_class is not None and walk.head_class.tolist() == [0, 1, 0, 2]
    assert walk.starts.numel() == 3 * 4 + 1
    assert rows(PerHead([Causal(), Causal()]), 2, 64, 64, 16, 16, DEVICE).head_class is None


def test_every_part_starts_at_16_bytes_whatever_the_mask_so_that_kernels_compile_once() -> None:
    for mask in MASKS:
        for walk in (rows(mask, mask.heads or 2, 37, 50, 8, 16, DEVICE), columns(mask, 2, 37, 50, 8, 16, DEVICE)):
            parts = [part for part in walk if part is not None]
            assert all(part.dtype == torch.int32 and part.is_contiguous() for part in parts)
            assert all(part.data_ptr() % 16 == 0 for part in parts)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_long_sequences_are_judged_in_pieces_to_the_same_result(mask: Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (mask, mask.heads or 2, 37, 50, 4, 4, DEVICE)
    whole = [rows(*arguments), columns(*arguments)]
    monkeypatch.setattr(walks, "AT_ONCE", 20)
    monkeypatch.setattr(walks, "_WALKS", Kept(8))
    monkeypatch.setattr(walks, "_MAPS", Kept(8))
    for walk, again in zip(whole, [rows(*arguments), columns(*arguments)], strict=True):
        assert again is not walk
        for part, other in zip(walk, again, strict=True):
            assert part is other is None or torch.equal(part, other)


def test_walks_are_made_once_and_on_the_host_in_any_mode() -> None:
    arguments = (Documents([0, 3, 8]) & Causal(), 2, 32, 32, 16, 16, DEVICE)
    with torch.device("meta"), torch.inference_mode():
        walk = columns(*arguments)
    assert walk.tiles.device == DEVICE and not walk.tiles.is_inference()
    assert columns(*arguments) is walk
    assert rows(*arguments) is not walk
