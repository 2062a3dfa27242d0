"""The table of tiles of packed documents, and the order that persistent programs take them in."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.support.attention import DEVICE

pytest.importorskip("triton")

BLOCK = 16
QUERIES = [[0, 64, 64, 65, 130, 177], [0, 16, 32, 48], [0, 0, 200], [0, 33]]
KEYS = [[0, 10, 90, 91, 300, 340], [0, 16, 32, 48], [0, 5, 150], [0, 99]]


def table(cu_q: list[int], cu_k: list[int], spare: int, **known: bool) -> list[tuple[int, ...]]:
    from attnzoo.ops.softmax.triton.documents import document_tiles_kernel

    tiles = sum(-(-(b - a) // BLOCK) for a, b in itertools.pairwise(cu_q)) + spare
    entries = torch.full((tiles, 8), -7, dtype=torch.int32, device=DEVICE)
    ends = [torch.tensor(cu, dtype=torch.int32, device=DEVICE) for cu in (cu_q, cu_k)]
    document_tiles_kernel[(tiles,)](entries, *ends, len(cu_q) - 1, BLOCK=BLOCK, DOCUMENTS=8, **known, num_warps=1)
    return [tuple(row[:6]) for row in entries.tolist()]


def expected(cu_q: list[int], cu_k: list[int]) -> list[tuple[int, ...]]:
    return [
        (first, cu_q[n], cu_q[n + 1] - cu_q[n], cu_k[n], cu_k[n + 1] - cu_k[n], n)
        for n in range(len(cu_q) - 1)
        for first in range(0, cu_q[n + 1] - cu_q[n], BLOCK)
    ]


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize(("cu_q", "cu_k"), [*zip(QUERIES, KEYS, strict=True), *zip(QUERIES, QUERIES, strict=True)])
def test_each_tile_of_each_document_has_one_entry_and_the_rest_have_no_rows(cu_q, cu_k, spare) -> None:
    want = expected(cu_q, cu_k)
    plain = table(cu_q, cu_k, spare, SORTED=False, CAUSAL=False)
    assert plain[: len(want)] == want
    assert all(first >= rows for first, _, rows, *_ in plain[len(want) :])
    for causal in (False, True):
        found = table(cu_q, cu_k, spare, SORTED=True, CAUSAL=causal)
        assert sorted(found[: len(want)]) == sorted(want)
        assert all(first >= rows for first, _, rows, *_ in found[len(want) :])


@pytest.mark.parametrize(("cu_q", "cu_k"), [*zip(QUERIES, KEYS, strict=True), *zip(QUERIES, QUERIES, strict=True)])
def test_tiles_that_see_the_most_keys_come_last(cu_q, cu_k) -> None:
    count = len(expected(cu_q, cu_k))
    causal = table(cu_q, cu_k, 2, SORTED=True, CAUSAL=True)[:count]
    ends = [first + k_rows - q_rows for first, _, q_rows, _, k_rows, _ in causal]
    assert ends == sorted(ends)
    full = table(cu_q, cu_k, 2, SORTED=True, CAUSAL=False)[:count]
    assert [row[4] for row in full] == sorted(row[4] for row in full)
