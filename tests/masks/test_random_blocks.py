"""Random blocks: how many, which, and the same ones each time; BigBird's pattern, which is made of them."""

from __future__ import annotations

import itertools

import pytest
import torch

from attnzoo.masks import Causal, RandomBlocks, big_bird


def drawn(mask: RandomBlocks, blocks: int) -> list[set[int]]:
    """The blocks of keys that each block of queries sees."""
    length = blocks * mask.block
    seen = mask.dense(length, length).unflatten(1, (blocks, -1)).unflatten(0, (blocks, -1)).transpose(1, 2)
    assert torch.equal(seen.any(-1).any(-1), seen.all(-1).all(-1)), "blocks are seen whole or not at all"
    return [set(row.nonzero().flatten().tolist()) for row in seen.any(-1).any(-1)]


@pytest.mark.parametrize("near, edge", [(0, 0), (1, 1), (2, 0)])
def test_each_block_sees_as_many_random_blocks_as_it_may(near: int, edge: int) -> None:
    for seed in range(5):
        causal = drawn(RandomBlocks(3, 2, seed, near=near, edge=edge), 30)
        both = drawn(RandomBlocks(3, 2, seed, length=60, near=near, edge=edge), 30)
        for a in range(30):
            assert len(causal[a]) == min(3, max(0, a - near - edge)) and all(edge <= b < a - near for b in causal[a])
            assert len(both[a]) == 3 and all(edge <= b < 30 - edge and abs(a - b) > near for b in both[a])


def test_causal_random_blocks_do_not_hang_on_the_length_and_stay_under_causal() -> None:
    mask = RandomBlocks(2, 3, seed=5)
    assert drawn(mask, 40)[:20] == drawn(mask, 20)
    assert torch.equal((mask & Causal()).dense(60, 60), mask.dense(60, 60))
    assert torch.equal(mask.dense(7, 60), mask.dense(60, 60)[-7:])


def test_random_blocks_follow_the_seed_and_are_spread_evenly() -> None:
    one, other = (drawn(RandomBlocks(2, 1, seed, length=64), 64) for seed in (1, 2))
    assert one == drawn(RandomBlocks(2, 1, 1, length=64), 64) and one != other
    assert drawn(RandomBlocks(2, 1, 1 + 2**32, length=64), 64) != one
    counts = torch.zeros(64)
    for seed in range(200):
        for row in drawn(RandomBlocks(3, 1, seed, length=64), 64):
            counts[list(row)] += 1
    expected = 200 * 64 * 3 / 64
    assert (counts - expected).abs().max() < 5 * expected**0.5


def test_big_bird_is_a_window_of_blocks_with_global_and_random_ones_apart() -> None:
    rest = RandomBlocks(2, 4, 7, length=48, near=1, edge=1)
    mask = big_bird(4, random=2, seed=7, length=48).dense(48, 48)
    random = drawn(rest, 12)
    for i, j in itertools.product(range(48), range(48)):
        a, b = i // 4, j // 4
        assert mask[i, j] == (abs(a - b) <= 1 or a in (0, 11) or b in (0, 11) or b in random[a])
    assert mask[20].sum() == (3 + 2 + 2) * 4
    decoder = big_bird(4, random=2)
    assert decoder.causal and decoder.dense(48, 48)[47].sum() == (2 + 1 + 2) * 4
