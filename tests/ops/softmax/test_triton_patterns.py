from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

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
    longformer,
)
from attnzoo.ops.softmax.triton.patterns import lower
from attnzoo.ops.softmax.triton.sees import sees

ROOT = Path(__file__).parents[3]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

SINGLE = [
    Full(),
    Causal(),
    SlidingWindow(5),
    SlidingWindow(3, ahead=4),
    SlidingWindow(1 << 40, ahead=1 << 40),
    Dilated(4, 3),
    Dilated(3, 4, ahead=2),
    Dilated(1 << 40, 1 << 20),
    Documents([0, 3, 3, 4, 11, 19]),
    Documents([0, 0]),
    Documents([0, 5, 500]),
    GlobalTokens(3),
    GlobalTokens(0),
    GlobalTokens((0, 4, 5, 17, 900)),
    RandomBlocks(2, 3),
    RandomBlocks(0, 3),
    RandomBlocks(3, 1, seed=7, near=1, edge=1),
    RandomBlocks(2, 4, length=23),
    RandomBlocks(2, 1 << 40),
    Blockwise(SlidingWindow(2, ahead=1), 3),
    Blockwise(Causal(), 8),
    Blockwise(Documents([0, 2, 5]), 4),
    Blockwise(Blockwise(GlobalTokens((1,)), 2), 3),
]
NESTED = [
    Documents([0, 7, 20]) & Causal(),
    (SlidingWindow(3) | GlobalTokens(2)) & Causal() & Documents([0, 9, 23]),
    Dilated(3, 5) | (GlobalTokens((6,)) & Full()),
    Documents([0, 9, 23]) | Documents([0, 4, 30]),
    Blockwise((Dilated(2, 2) | RandomBlocks(1, 2)) & Causal(), 2),
    longformer(6, (0, 9)),
    big_bird(4, random=2),
    big_bird(4, random=2, length=28),
]
BY_HEAD = [
    PerHead([SlidingWindow(4), Dilated(4, 2), Dilated(4, 2), Full()]),
    PerHead([big_bird(4, random=2, seed=seed) for seed in range(3)]),
    PerHead([GlobalTokens(1), GlobalTokens((3, 4)), Causal()]) & Documents([0, 6, 6, 21]),
    Documents([0, 6, 21]) | Blockwise(PerHead([RandomBlocks(1, 1), Causal(), RandomBlocks(2, 1)]), 3),
    PerHead([Causal(), Full()]) & PerHead([SlidingWindow(2), GlobalTokens(5)]),
]


@triton.jit
def write(
    out, tables, first, rows, columns, PROGRAM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, KEYS_FIRST: tl.constexpr
):
    """Each head's mask from query position `first` on, [rows, columns]; in tiles of [N, M] if KEYS_FIRST."""
    head = tl.program_id(0)
    if KEYS_FIRST:
        i = first + tl.arange(0, M)[None, :]
        j = tl.arange(0, N)[:, None]
    else:
        i = first + tl.arange(0, M)[:, None]
        j = tl.arange(0, N)[None, :]
    seen = sees(PROGRAM, tables, head, i, j)
    row = i - first
    at = out + (head * rows + row) * columns + j
    tl.store(at, seen.to(tl.int8), mask=(row < rows) & (j < columns))


def written(mask: Mask, q_len: int, k_len: int, keys_first: bool = False) -> torch.Tensor:
    """What the kernel says of every query and key, [heads, q_len, k_len]."""
    heads = mask.heads or 2
    program, tables = lower(mask, heads, q_len, k_len, DEVICE)
    out = torch.full((heads, q_len, k_len), -1, dtype=torch.int8, device=DEVICE)
    sides = (max(16, triton.next_power_of_2(n)) for n in (q_len, k_len))
    write[(heads,)](out, tables, k_len - q_len, q_len, k_len, program, *sides, keys_first)
    return out


def assert_same(mask: Mask, q_len: int, k_len: int, keys_first: bool = False) -> None:
    got = written(mask, q_len, k_len, keys_first)
    torch.testing.assert_close(
        got, mask.dense(q_len, k_len, device=DEVICE).to(torch.int8).expand_as(got), rtol=0, atol=0
    )


@pytest.mark.parametrize("mask", [*SINGLE, *NESTED, *BY_HEAD], ids=str)
@pytest.mark.parametrize(("q_len", "k_len"), [(23, 23), (7, 31), (29, 13)])
def test_a_kernel_sees_what_the_mask_says(mask: Mask, q_len: int, k_len: int) -> None:
    assert_same(mask, q_len, k_len)


@pytest.mark.parametrize("mask", [*SINGLE, *NESTED, *BY_HEAD], ids=str)
def test_a_tile_may_stand_with_its_keys_first(mask: Mask) -> None:
    assert_same(mask, 19, 23, keys_first=True)
