"""`decode` against the textbook, over caches whose dead parts hold NaN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from attnzoo.masks import Causal, Documents, Full, SlidingWindow
from attnzoo.ops.decoding import decode, explain_decode
from attnzoo.ops.decoding.reference import decode_reference


@dataclass
class Rows:
    """Keys and values with row lengths, and NaN behind each row's end."""

    k: Tensor
    v: Tensor
    counts: list[int]

    def __post_init__(self) -> None:
        dead = torch.arange(self.k.shape[2]) >= self.lengths[:, None]
        self.k = self.k.masked_fill(dead[:, None, :, None], torch.nan)
        self.v = self.v.masked_fill(dead[:, None, :, None], torch.nan)

    @property
    def length(self) -> int:
        return max(self.counts)

    @property
    def uniform(self) -> bool:
        return len(set(self.counts)) == 1

    @property
    def lengths(self) -> Tensor:
        return torch.tensor(self.counts)

    @property
    def first(self) -> int:
        return 0

    @property
    def kept(self) -> None:
        return None

    def row_lengths(self) -> list[int]:
        return self.counts

    def view(self) -> tuple[Tensor, Tensor]:
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


def rows(counts: list[int], heads: int = 2, size: int = 4, v_size: int = 4, dtype: torch.dtype = torch.float64) -> Rows:
    shape = len(counts), heads, max(counts) + 3
    return Rows(torch.randn(*shape, size, dtype=dtype), torch.randn(*shape, v_size, dtype=dtype), counts)


MASKS = [None, Full(), Causal(), SlidingWindow(1), SlidingWindow(4), SlidingWindow(3) | SlidingWindow(9) & Causal()]


@settings(max_examples=80, deadline=None)
@given(
    before=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    q_len=st.sampled_from([1, 2, 5, 16, 17, 23]),
    padding=st.lists(st.integers(0, 23), min_size=3, max_size=3),
    even=st.booleans(),
    mask=st.sampled_from(MASKS),
    heads=st.sampled_from([(4, 2), (3, 3), (6, 1)]),
    softcap=st.sampled_from([None, 1.5]),
    sinks=st.booleans(),
    v_size=st.sampled_from([4, 3]),
)
def test_decode_is_the_textbook_for_rows_of_any_lengths(
    before: list[int],
    q_len: int,
    padding: list[int],
    even: bool,
    mask: Any,
    heads: tuple[int, int],
    softcap: float | None,
    sinks: bool,
    v_size: int,
) -> None:
    starts = [before[0]] * len(before) if even else before
    counts = [start + max(q_len - pad, 0) for start, pad in zip(starts, padding, strict=False)]
    cache = rows(counts, heads[1], v_size=v_size)
    q = torch.randn(len(counts), heads[0], q_len, 4, dtype=torch.float64)
    sink = torch.randn(heads[0], dtype=torch.float64) if sinks else None
    expected = decode_reference(
        q, cache.k, cache.v, counts, starts, mask=mask or Full(), scale=0.7, softcap=softcap, sinks=sink
    )
    given_starts = starts[0] if even else torch.tensor(starts)
    out = decode(q, cache, mask=mask, scale=0.7, softcap=softcap, sinks=sink, starts=given_starts)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("counts", [[9, 9], [9, 4], [9, 2], [20, 1]])
@pytest.mark.parametrize("q_len", [1, 3, 18])
@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(3)], ids=str)
def test_queries_stand_at_the_end_of_their_rows_unless_told(counts: list[int], q_len: int, mask: Any) -> None:
    cache, q = rows(counts), torch.randn(2, 4, q_len, 4, dtype=torch.float64)
    starts = [count - q_len for count in counts]
    expected = decode_reference(q, cache.k, cache.v, counts, starts, mask=mask, scale=0.5)
    torch.testing.assert_close(decode(q, cache, mask=mask), expected, rtol=0, atol=1e-12)


def test_queries_that_see_no_key_give_zero() -> None:
    for counts in ([0, 0], [0, 3]):
        out = decode(torch.randn(2, 4, 1, 4, dtype=torch.float64), rows(counts), starts=torch.tensor(counts) - 1)
        assert not out[0].any() and bool(out[1].any()) == (counts[1] > 0)
    outside = Documents((0, 3))  # positions after the last document see nothing
    out = decode(torch.randn(2, 4, 1, 4, dtype=torch.float64), rows([4, 3]), mask=outside)
    assert not out[0].any() and out[1].any()


def test_gradients_of_queries_are_right_in_fp64() -> None:
    cache, sinks = rows([7, 4]), torch.randn(4, dtype=torch.float64).requires_grad_()
    q = torch.randn(2, 4, 2, 4, dtype=torch.float64).requires_grad_()
    options: dict[str, Any] = {"mask": SlidingWindow(3), "scale": 0.5, "softcap": 2.0}
    torch.autograd.gradcheck(lambda q, sinks: decode(q, cache, sinks=sinks, **options), (q, sinks))
    torch.autograd.gradcheck(
        lambda q, sinks: decode_reference(q, cache.k, cache.v, [7, 4], [5, 2], sinks=sinks, **options), (q, sinks)
    )


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that `decode` had made, views and the inside of `attention` aside."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for made in pytree.tree_leaves(out):
            if isinstance(made, Tensor) and not func.is_view:
                self.elements = max(self.elements, made.numel())
        return out


@pytest.mark.parametrize("counts", [[1024, 1024], [1024, 700]])
def test_long_chunks_over_long_rows_stay_linear_in_memory(counts: list[int]) -> None:
    cache, q = rows(counts, heads=1, dtype=torch.float32), torch.randn(2, 1, 512, 4)
    with Largest() as largest:
        decode(q, cache, mask=SlidingWindow(64))
    assert 0 < largest.elements < 512 * 1024 // 2


@pytest.mark.parametrize(
    ("q", "options", "message"),
    [
        (torch.ones(3, 4, 1, 4), {}, r"q has shape \[3, 4, 1, 4\]"),
        (torch.ones(2, 3, 1, 4), {}, r"q has shape \[2, 3, 1, 4\]"),
        (torch.ones(2, 4, 1, 5), {}, r"q has shape \[2, 4, 1, 5\]"),
        (torch.ones(2, 4, 4), {}, r"q has shape \[2, 4, 4\]"),
        (
            torch.ones(2, 4, 2, 4),
            {"starts": 2},
            "starts holds 2; 2 queries at the end of a row of 5 tokens start from 3 to 5",
        ),
        (torch.ones(2, 4, 2, 4), {"starts": 6}, "starts holds 6"),
        (torch.ones(2, 4, 20, 4), {"starts": torch.tensor([0, 6])}, "starts holds 6"),
        (torch.ones(2, 4, 2, 4), {"starts": torch.tensor([3])}, r"starts has shape \[1\]"),
    ],
)
def test_queries_that_do_not_fit_the_cache_are_named(q: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(q.double(), rows([5, 5]), **options)


def test_explain_names_the_choice_and_every_reason() -> None:
    q, rows = torch.randn(2, 4, 17, 8), Rows(torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8), [20, 18])
    first, *others = explain_decode(q, rows, mask=Causal()).splitlines()
    assert first.startswith("triton: ") and "takes up to 16 queries, not 17" in first
    assert others[0] == "attention: runs"
    assert others[1].startswith("reference: ") and len(others) == 2
