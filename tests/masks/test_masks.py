"""Masks: the dense form against loops over pairs, and everything else against the dense form."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnzoo.masks import Causal, Documents, Full, Mask, SlidingWindow, Tile, mask_from_dict

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
    ],
)
def test_dense_mask_follows_its_definition(mask: Mask, sees, q_len: int, k_len: int) -> None:
    assert torch.equal(mask.dense(q_len, k_len), by_hand(q_len, k_len, sees))


def patterns() -> st.SearchStrategy[Mask]:
    lengths = st.lists(st.integers(0, 9), min_size=1, max_size=5)
    single = st.one_of(
        st.just(Full()),
        st.just(Causal()),
        st.integers(1, 12).map(SlidingWindow),
        lengths.map(lambda n: Documents([0, *torch.tensor(n).cumsum(0).tolist()])),
    )
    pair = st.tuples(single, single, st.booleans()).map(lambda t: t[0] & t[1] if t[2] else t[0] | t[1])
    return st.one_of(single, pair)


@settings(max_examples=150, deadline=None)
@given(patterns(), st.integers(1, 24), st.integers(1, 24), st.integers(1, 7), st.integers(1, 7))
def test_block_map_never_skips_a_visible_pair_nor_fills_a_hidden_one(mask, q_len, k_len, block_q, block_k) -> None:
    dense, blocks = mask.dense(q_len, k_len), mask.block_map(q_len, k_len, block_q, block_k)
    assert blocks.shape == (-(-q_len // block_q), -(-k_len // block_k))
    for a in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            tile = dense[a * block_q : (a + 1) * block_q, b * block_k : (b + 1) * block_k]
            if blocks[a, b] == Tile.EMPTY:
                assert not tile.any()
            if blocks[a, b] == Tile.FULL:
                assert tile.all()


@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(256), Documents([0, 512, 1024])])
def test_block_map_is_exact_on_aligned_tiles(mask: Mask) -> None:
    blocks = mask.block_map(1024, 1024, 128, 128)
    tiles = mask.dense(1024, 1024).reshape(8, 128, 8, 128).transpose(1, 2).flatten(2)
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


def test_drawing_saves_a_picture(tmp_path) -> None:
    (SlidingWindow(4) | Documents([0, 4, 16])).draw(tmp_path / "mask.png", 16)
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")


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
        (lambda: Causal().block_map(4, 4, 0, 4), "block_q and block_k must be at least 1"),
    ],
)
def test_bad_masks_are_refused_by_name(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
