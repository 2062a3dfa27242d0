"""Masks: the dense form against loops over pairs, and everything else against the dense form."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnzoo.masks import (
    And,
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
    Tile,
    big_bird,
    longformer,
    mask_from_dict,
)

DOCUMENTS = [0, 3, 3, 8, 12]


def by_hand(q_len: int, k_len: int, sees) -> torch.Tensor:
    shift = k_len - q_len
    return torch.tensor([[sees(i + shift, j) for j in range(k_len)] for i in range(q_len)]).reshape(q_len, k_len)


def same_document(i: int, j: int) -> bool:
    return any(a <= i < b and a <= j < b for a, b in itertools.pairwise(DOCUMENTS))


@pytest.mark.parametrize(("q_len", "k_len"), [(7, 7), (3, 11), (11, 3), (1, 5), (14, 14)])
@pytest.mark.parametrize(
    ("mask", "sees"),
    [
        (Full(), lambda i, j: True),
        (Causal(), lambda i, j: j <= i),
        (SlidingWindow(1), lambda i, j: i == j),
        (SlidingWindow(4), lambda i, j: 0 <= i - j < 4),
        (Documents(DOCUMENTS), same_document),
        (Documents(torch.tensor(DOCUMENTS)) & Causal(), lambda i, j: same_document(i, j) and j <= i),
        (SlidingWindow(2) | Documents(DOCUMENTS), lambda i, j: same_document(i, j) or 0 <= i - j < 2),
        (SlidingWindow(3, ahead=2), lambda i, j: j in range(i - 2, i + 3)),
        (Dilated(3, 2), lambda i, j: j in (i, i - 2, i - 4)),
        (Dilated(2, 3, ahead=1), lambda i, j: j in (i + 3, i, i - 3)),
        (GlobalTokens(2), lambda i, j: i in (0, 1) or j in (0, 1)),
        (GlobalTokens((7, 0, 2, 3, 2)), lambda i, j: i in (0, 2, 3, 7) or j in (0, 2, 3, 7)),
        (GlobalTokens(torch.tensor([1, 4])) & Causal(), lambda i, j: j <= i and (i in (1, 4) or j in (1, 4))),
        (GlobalTokens(()), lambda i, j: False),
        (
            GlobalTokens(range(0, 30, 3)),
            lambda i, j: i in range(0, 30, 3) or j in range(0, 30, 3),
        ),  # more stretches than are compared
        (Blockwise(Causal(), 3), lambda i, j: j // 3 <= i // 3),
        (longformer(4, (0, 5)), lambda i, j: abs(i - j) <= 2 or i in (0, 5) or j in (0, 5)),
        (longformer(4, 1, dilation=2), lambda i, j: j - i in (-4, -2, 0, 2, 4) or 0 in (i, j)),
        (longformer(3, 1, causal=True), lambda i, j: j <= i and (i - j < 3 or j == 0 or i == 0)),
        (RandomBlocks(0, 2), lambda i, j: False),
        (RandomBlocks(99, 2), lambda i, j: j // 2 < i // 2),
        (RandomBlocks(99, 2, near=1, edge=1), lambda i, j: 1 <= j // 2 < i // 2 - 1),
        (RandomBlocks(99, 2, length=9), lambda i, j: 0 <= i < 10 and j < 10 and i // 2 != j // 2),
        (
            RandomBlocks(99, 1, length=8, near=1, edge=1),
            lambda i, j: 0 <= i < 8 and j in range(1, 7) and abs(i - j) > 1,
        ),
    ],
)
def test_dense_mask_follows_its_definition(mask: Mask, sees, q_len: int, k_len: int) -> None:
    assert torch.equal(mask.dense(q_len, k_len), by_hand(q_len, k_len, sees))


def one_head() -> st.SearchStrategy[Mask]:
    lengths = st.lists(st.integers(0, 9), min_size=1, max_size=5)
    small, length = st.integers(0, 3), st.one_of(st.none(), st.integers(1, 24))
    single = st.one_of(
        st.just(Full()),
        st.just(Causal()),
        st.builds(SlidingWindow, st.integers(1, 12), st.integers(0, 5)),
        lengths.map(lambda n: Documents([0, *torch.tensor(n).cumsum(0).tolist()])),
        st.builds(Dilated, st.integers(1, 5), st.integers(1, 5), small),
        st.builds(GlobalTokens, st.one_of(small, st.lists(st.integers(0, 25), max_size=5))),
        st.builds(RandomBlocks, small, st.integers(1, 5), st.integers(0, 2**40), length, small, small),
        st.builds(Blockwise, st.builds(SlidingWindow, st.integers(1, 3), small), st.integers(1, 5)),
    )
    pair = st.tuples(single, single, st.booleans()).map(lambda t: t[0] & t[1] if t[2] else t[0] | t[1])
    return st.one_of(single, pair)


def patterns() -> st.SearchStrategy[Mask]:
    heads = st.lists(one_head(), min_size=2, max_size=2).map(PerHead)
    return st.one_of(one_head(), heads, st.builds(And, heads, one_head()))


@settings(max_examples=150, deadline=None)
@given(patterns(), st.integers(1, 24), st.integers(1, 24), st.integers(1, 7), st.integers(1, 7))
def test_block_map_never_skips_a_visible_pair_nor_fills_a_hidden_one(mask, q_len, k_len, block_q, block_k) -> None:
    dense, blocks = mask.dense(q_len, k_len), mask.block_map(q_len, k_len, block_q, block_k)
    assert blocks.shape == (*dense.shape[:-2], -(-q_len // block_q), -(-k_len // block_k))
    for head in range(mask.heads or 1):
        alone = mask.head(head)
        assert torch.equal(alone.dense(q_len, k_len), dense if mask.heads is None else dense[head])
        queries, keys = range(k_len - q_len, k_len), range(k_len)
        map_ = blocks if mask.heads is None else blocks[head]
        check_tiles(
            alone,
            [queries[at : at + block_q] for at in range(0, q_len, block_q)],
            [keys[at : at + block_k] for at in range(0, k_len, block_k)],
            map_,
        )


@settings(max_examples=150, deadline=None)
@given(one_head(), st.integers(1, 40), st.integers(1, 40))
def test_cut_positions_are_all_there_once_and_their_tiles_are_judged_rightly(mask, q_len, k_len) -> None:
    queries, keys = mask.cut(range(k_len - q_len, k_len)), mask.cut(range(k_len))
    assert sorted(p for r in queries for p in r) == list(range(k_len - q_len, k_len))
    assert sorted(p for r in keys for p in r) == list(range(k_len))
    check_tiles(mask, queries, keys, mask.tile_map(queries, keys))


def check_tiles(mask: Mask, queries: list[range], keys: list[range], tiles: torch.Tensor) -> None:
    for (a, i), (b, j) in itertools.product(enumerate(queries), enumerate(keys)):
        pairs = mask.visible(torch.tensor([*i])[:, None], torch.tensor([*j])[None])
        if tiles[a, b] == Tile.EMPTY:
            assert not pairs.any()
        if tiles[a, b] == Tile.FULL:
            assert pairs.all()


@pytest.mark.parametrize(
    "mask",
    [
        Causal(),
        SlidingWindow(256),
        SlidingWindow(129, ahead=128),
        Documents([0, 512, 1024]),
        Dilated(3, 300),
        Dilated(2, 64, ahead=1),
        GlobalTokens((0, 500, *range(768, 896))),
        RandomBlocks(2, 128, length=1024),
        RandomBlocks(1, 32),
        big_bird(128, random=1, length=1024),
        PerHead((Causal(), Dilated(4, 128))),
    ],
    ids=lambda mask: str(mask)[:40],
)
def test_block_map_is_exact_on_aligned_tiles(mask: Mask) -> None:
    blocks = mask.block_map(1024, 1024, 128, 128)
    dense = mask.dense(1024, 1024)
    tiles = dense.unflatten(-1, (8, 128)).unflatten(-3, (8, 128)).transpose(-3, -2).flatten(-2)
    assert torch.equal(blocks != Tile.EMPTY, tiles.any(-1))
    assert torch.equal(blocks == Tile.FULL, tiles.all(-1))


@settings(max_examples=50, deadline=None)
@given(patterns(), st.integers(0, 20), st.integers(0, 20))
def test_density_is_the_share_of_visible_pairs(mask: Mask, q_len: int, k_len: int) -> None:
    pairs = mask.dense(q_len, k_len)
    assert mask.density(q_len, k_len) == pytest.approx(pairs.double().mean().item() if pairs.numel() else 0.0)


@settings(max_examples=50, deadline=None)
@given(patterns())
def test_mask_survives_a_round_trip_through_json(mask: Mask) -> None:
    assert mask_from_dict(json.loads(mask.text)) == mask
    assert mask_from_dict(json.loads(json.dumps(mask.to_dict()))) == mask
    assert hash(mask_from_dict(mask.to_dict())) == hash(mask)


def test_masks_know_whether_they_are_causal() -> None:
    later = torch.ones(24, 24, dtype=torch.bool).triu(1)
    for mask in (
        Causal(),
        SlidingWindow(3),
        Dilated(2, 3),
        RandomBlocks(2, 2),
        longformer(4, 2, causal=True),
        big_bird(4),
    ):
        assert mask.causal and not (mask.dense(24, 24) & later).any()
    for mask in (Full(), SlidingWindow(3, 1), Dilated(2, 3, 1), RandomBlocks(2, 2, length=24), longformer(4, 2)):
        assert not mask.causal and (mask.dense(24, 24) & later).any()
        assert (mask & Causal()).causal and not (mask | Causal()).causal
        assert not PerHead((mask, Causal())).causal


def test_text_of_a_mask_leaves_defaults_out() -> None:
    assert SlidingWindow(4).to_dict() == {"pattern": "sliding_window", "window": 4}
    assert mask_from_dict({"pattern": "sliding_window", "window": 4, "ahead": 0}) == SlidingWindow(4)
    assert GlobalTokens((2, 1, 0)) == GlobalTokens(3)
    assert str(longformer(4, (0, 1, 9), causal=True)) == "(SlidingWindow(window=4) | GlobalTokens(0..1, 9)) & Causal()"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingWindow(0), "window must be an integer of at least 1, got 0"),
        (lambda: SlidingWindow(2.0), "window must be an integer"),
        (lambda: Documents([1, 4]), "cu_seqlens must be"),
        (lambda: Documents([0, 4, 3]), "cu_seqlens must be"),
        (lambda: Documents(torch.tensor(3)), "cu_seqlens must be"),
        (lambda: mask_from_dict({"pattern": "diagonal"}), "pattern must be one of"),
        (
            lambda: mask_from_dict({"pattern": "sliding_window", "size": 3}),
            r"takes \['ahead', 'window'\], got \['size'\]",
        ),
        (lambda: mask_from_dict({"pattern": "dilated", "window": 3}), r"takes .*'dilation'.*, got \['window'\]"),
        (lambda: SlidingWindow(True), "window must be an integer"),
        (lambda: SlidingWindow(2, ahead=-1), "ahead must be an integer of at least 0, got -1"),
        (lambda: Dilated(0, 2), "window must be an integer of at least 1, got 0"),
        (lambda: Dilated(2, 0), "dilation must be an integer of at least 1, got 0"),
        (lambda: Dilated(2, 1, -1), "ahead must be"),
        (lambda: GlobalTokens(-1), "tokens must be an integer of at least 0, got -1"),
        (lambda: GlobalTokens((3, -2)), "each index of tokens must be an integer of at least 0, got -2"),
        (lambda: GlobalTokens((0.5,)), "each index of tokens must be an integer"),
        (lambda: RandomBlocks(-1, 4), "per_row must be an integer of at least 0, got -1"),
        (lambda: RandomBlocks(1, 0), "block must be an integer of at least 1, got 0"),
        (lambda: RandomBlocks(1, 4, -1), "seed must be an integer of at least 0, got -1"),
        (lambda: RandomBlocks(1, 4, length=0), "length must be an integer of at least 1, got 0"),
        (lambda: RandomBlocks(1, 4, near=-1), "near must be an integer of at least 0, got -1"),
        (lambda: RandomBlocks(1, 4, edge=-1), "edge must be an integer of at least 0, got -1"),
        (lambda: Blockwise(Causal(), 0), "block must be an integer of at least 1, got 0"),
        (lambda: Blockwise("causal", 2), "mask must be one of attnzoo.masks, got 'causal'"),
        (lambda: PerHead(()), "masks must be at least one mask"),
        (lambda: PerHead((Causal(), 3)), "masks must be at least one mask"),
        (lambda: PerHead((PerHead((Causal(),)),)), "each of one head"),
        (lambda: PerHead((Causal(),) * 2) & PerHead((Full(),) * 3), r"same number of heads, got \[2, 3\]"),
        (lambda: longformer(5, 1), "window must be even, half of it to each side, got 5"),
        (lambda: longformer(0, 1), "window must be an integer of at least 2, got 0"),
        (lambda: big_bird(8, length=20), r"length must be a multiple of block \(8\), got 20"),
        (lambda: big_bird(0, length=20), "block must be an integer of at least 1, got 0"),
        (lambda: Causal().block_map(4, 4, 0, 4), "block_q and block_k must be at least 1"),
    ],
)
def test_bad_masks_are_refused_by_name(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_named_masks_stay_functions_after_patterns_were_looked_up() -> None:
    code = (
        "from attnzoo.masks import mask_from_dict\n"
        "mask_from_dict({'pattern': 'causal'})\n"
        "from attnzoo.masks import big_bird, longformer\n"
        "assert callable(big_bird) and callable(longformer)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
