"""How decoding is cut into programs, by shape and machine."""

from __future__ import annotations

import pytest

from attnzoo.ops.decoding.triton.plan import fitted, splits_for, tiles_for


@pytest.mark.parametrize(("programs", "splits"), [(8, 16), (16, 8), (128, 1), (512, 1)])
def test_programs_fill_the_multiprocessors_once(programs: int, splits: int) -> None:
    assert splits_for(programs, 256, 132) == splits


@pytest.mark.parametrize("tiles", [0, 1, 2])
def test_there_are_never_more_splits_than_tiles(tiles: int) -> None:
    assert 1 <= splits_for(1, tiles, 132) <= max(tiles, 1)


@pytest.mark.parametrize(("limit", "same"), [(227, True), (163, True), (99, False)])
def test_tiles_shrink_to_the_shared_memory_that_there_is(limit: int, same: bool) -> None:
    tiles = tiles_for(4, 128, 128, 2, False)
    small = fitted(tiles, 256, 512, limit * 1024)
    assert (small == tiles) == same
    assert small.block_m * 256 + (small.num_stages - 1) * small.block_n * 512 < limit * 1024


def test_a_tile_never_crosses_a_page_of_128_or_more() -> None:
    for page in (128, 256, 512):
        for dim in (64, 128):
            assert page % tiles_for(4, dim, dim, 2, False, page).block_n == 0


def test_tiles_of_short_vectors_hold_as_many_bytes() -> None:
    short, long = (tiles_for(4, dim, dim, 2, False) for dim in (64, 128))
    assert short.block_n * 64 == long.block_n * 128
