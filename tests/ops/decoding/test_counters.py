"""Counters of programs: each serves one number of splits, and captured calls share none."""

from __future__ import annotations

import torch

from attnzoo.ops.decoding.triton import counters
from attnzoo.ops.decoding.triton.plan import merge_for

CPU = torch.device("cpu")


def test_calls_of_one_number_of_splits_share_counters_and_others_do_not() -> None:
    first = counters.counters(CPU, 5, 3)
    assert counters.counters(CPU, 4, 3) is first
    assert counters.counters(CPU, 5, 4).data_ptr() != first.data_ptr()
    assert counters.counters(CPU, first.numel() + 1, 3).numel() > first.numel()


def test_captured_calls_get_counters_of_their_own_until_none_are_left() -> None:
    counters._pools[CPU] = torch.zeros(10, dtype=torch.int64)
    try:
        first, second, third = (counters._for_a_graph(CPU, 3) for _ in range(3))
    finally:
        del counters._pools[CPU]
    assert second.data_ptr() == first.data_ptr() + 4 * 8
    assert third.data_ptr() not in (first.data_ptr(), second.data_ptr())  # the pool had two left
    assert [x.tolist() for x in (first, second, third)] == [[0] * 4] * 3


def test_programs_share_the_merging_where_there_is_much_of_it() -> None:
    assert merge_for(4, 16, 128, 4).share == 0
    for rows, splits, v_dim in ((32, 8, 128), (16, 128, 512), (16, 5, 512), (64, 3, 256)):
        merge = merge_for(rows, splits, v_dim, 4)
        assert (merge.share - 1) * splits < rows <= merge.share * splits
        assert merge.splits >= splits and merge.rows < 2 * merge.share
        assert merge.rows * merge.splits * merge.width <= 64 * 128
