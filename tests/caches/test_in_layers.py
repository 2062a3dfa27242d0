"""Layers with every cache: however a sequence is cut, each row gets what one full pass gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from attnzoo.caches import PagedCache, RollingCache, to_left_padding, to_right_padding
from attnzoo.caches.quantization import Int8Storage
from attnzoo.caches.token_cache import TokenCache
from attnzoo.layers import GroupedQueryAttention, RotaryEmbedding, SlidingWindowAttention
from attnzoo.layers.rotation import rotate_new
from tests.caches.kinds import HEADS, KINDS, MARGIN, WINDOW, Kind, half_a_step, poison

DIM, SIZE, TOTAL = 16, 4, 70


def make(kind: Kind, window: bool = False) -> GroupedQueryAttention:
    torch.manual_seed(0)
    options: dict[str, Any] = {"rope": RotaryEmbedding(SIZE, base=100.0), "qk_norm": True}
    if window or kind is KINDS["rolling"]:
        return SlidingWindowAttention(DIM, 2 * HEADS, WINDOW, num_kv_heads=HEADS, **options).double()
    return GroupedQueryAttention(DIM, 2 * HEADS, HEADS, **options).double()


def allowed(layer: GroupedQueryAttention, cache: TokenCache, kind: Kind, x: Tensor) -> float:
    """How far the layer's output may be off: rounding, and what half a step of int8 in keys and values makes of it."""
    if not isinstance(cache._storages()[0], Int8Storage):
        return 1e-12
    q, (k, v) = layer.project_q(x), layer.project_kv(x)
    assert layer.rope is not None
    q, k = rotate_new(layer.rope, q, k)
    score = SIZE**-0.5 * q.abs().sum(-1).max() * half_a_step(k, kind.symmetric).max()
    # Each weight changes by a factor of at most exp(2 * score), so all together by at most exp(2 * score) - 1.
    head = half_a_step(v, kind.symmetric).max() + (math.exp(2 * score) - 1) * v.abs().max()
    return float(head * layer.o_proj.weight.abs().sum(-1).max()) + 1e-5


@dataclass
class Session:
    """Rows that are being decoded: where their tokens come from, and how many of them the cache has."""

    layer: GroupedQueryAttention
    cache: TokenCache
    x: Tensor  # [rows, TOTAL, DIM]
    expected: Tensor
    within: float
    source: list[int]
    seen: list[int]

    def feed(self, counts: list[int], *, padding: int = 0, wrong: int = 0) -> None:
        """The next `counts[b]` tokens of each row, `wrong` guesses after them that are cropped, and NaN as padding."""
        fed = [count + wrong for count in counts]
        chunk = torch.full((len(counts), max(fed) + padding, DIM), torch.nan, dtype=torch.float64)
        for b, (row, at, count) in enumerate(zip(self.source, self.seen, counts, strict=True)):
            chunk[b, :count] = self.x[row, at : at + count]
            chunk[b, count : count + wrong] = torch.randn(wrong, DIM)
        lengths = torch.tensor(fed) if min(fed) < chunk.shape[1] else None
        poison(self.cache)
        out = self.layer(chunk, cache=self.cache, key_lengths=lengths)
        assert out.isfinite().all()
        for b, (row, at, count) in enumerate(zip(self.source, self.seen, counts, strict=True)):
            off = (out[b, :count] - self.expected[row, at : at + count]).abs()
            assert count == 0 or off.max() <= self.within, f"row {b}, from token {at}: off by {off.max()}"
        self.seen = [at + count for at, count in zip(self.seen, counts, strict=True)]
        if wrong:
            self.cache.crop(torch.tensor(self.seen))
        assert self.cache.row_lengths() == self.seen

    def move(self, indices: list[int]) -> None:
        self.source, self.seen = ([part[index] for index in indices] for part in (self.source, self.seen))


def start(kind: Kind, window: bool = False, rows: int = 3) -> Session:
    layer, cache = make(kind, window), kind.new(rows, v_head_dim=SIZE)
    x = torch.randn(rows, TOTAL, DIM, dtype=torch.float64)
    with torch.no_grad():
        return Session(layer, cache, x, layer(x), allowed(layer, cache, kind, x), list(range(rows)), [0] * rows)


@pytest.mark.parametrize("window", [False, True], ids=["causal", "window"])
@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_cut_and_any_move_of_rows_gives_each_row_what_one_full_pass_gives(
    name: str, window: bool, data: st.DataObject
) -> None:
    session = start(KINDS[name], window)
    cache = session.cache
    actions = ["prompt", "chunk", "step", "step", "guess", "guesses", "reorder", "select", "repeat"]
    for action in data.draw(st.lists(st.sampled_from(actions), min_size=2, max_size=9)):
        size = len(session.seen)
        room = TOTAL - MARGIN - max(session.seen)
        if isinstance(cache, PagedCache):
            room = min(room, cache.free_pages // size * 16 - 16)
        if action == "prompt" and room > 0:  # of each row another length, right-padded
            counts = data.draw(st.lists(st.integers(0, min(room, 24)), min_size=size, max_size=size))
            session.feed(counts, padding=data.draw(st.integers(0, 2)))
        elif action == "chunk" and room > 0:
            session.feed([data.draw(st.integers(1, min(room, 30)))] * size)
        elif action == "step" and room > 0:
            session.feed([1] * size)
        elif action == "guess" and room > 0:  # all rows keep as many
            session.feed([1] * size, wrong=data.draw(st.integers(1, MARGIN)))
        elif action == "guesses" and room > 3:  # each row keeps what was right in it
            session.feed(data.draw(st.lists(st.integers(1, 3), min_size=size, max_size=size)), wrong=MARGIN)
        elif action == "repeat" and size < 4:
            cache.repeat(2)
            session.move([row for row in range(size) for _ in range(2)])
        elif action in ("reorder", "select"):
            few = size if action == "reorder" else data.draw(st.integers(1, 3))
            indices = data.draw(st.lists(st.integers(0, size - 1), min_size=few, max_size=few))
            (cache.reorder if action == "reorder" else cache.select)(torch.tensor(indices))
            session.move(indices)


@pytest.mark.parametrize("name", KINDS)
def test_a_left_padded_batch_is_turned_around_and_decodes_as_each_row_alone(name: str) -> None:
    session, lengths = start(KINDS[name]), torch.tensor([25, 3, 0])
    left = torch.full((3, 25, DIM), torch.nan, dtype=torch.float64)
    for row, count in enumerate(lengths.tolist()):
        left[row, 25 - count :] = session.x[row, :count]
    right = to_right_padding(left, lengths)
    out = to_left_padding(session.layer(right, cache=session.cache, key_lengths=lengths), lengths)
    for row, count in enumerate(lengths.tolist()):
        off = (out[row, 25 - count :] - session.expected[row, :count]).abs()
        assert count == 0 or off.max() <= session.within
    assert torch.equal(to_left_padding(right, lengths).nan_to_num(9.0), left.nan_to_num(9.0))
    session.seen = lengths.tolist()
    session.feed([1] * 3)
    session.feed([2] * 3)
    with pytest.raises(ValueError, match=r"lengths is torch.int64 of shape \[2\]"):
        to_right_padding(left, lengths[:2])


@pytest.mark.parametrize(("name", "ragged"), [("rolling", False), ("rolling", True), ("paged", True), ("int8", False)])
def test_compiled_steps_are_one_graph_that_serves_all_later_steps(name: str, ragged: bool) -> None:
    session = start(KINDS[name], rows=2)
    session.feed([12, 5] if ragged else [12, 12])
    if isinstance(session.cache, PagedCache):
        session.cache.reserve(16)
    torch._dynamo.reset()
    graphs, plain = CompileCounterWithBackend("aot_eager"), session.layer
    session.layer = torch.compile(plain, fullgraph=True, backend=graphs)  # type: ignore[assignment]
    counts = []
    for _ in range(14):
        session.feed([1, 1])
        counts.append(graphs.frame_count)
    assert counts[-1] <= 3 and counts[3:] == counts[3:4] * 11


def test_compiled_steps_into_new_pages_stay_right() -> None:
    session = start(KINDS["paged int8"], rows=2)
    session.feed([14, 14])
    torch._dynamo.reset()
    session.layer = torch.compile(session.layer, fullgraph=True, backend="aot_eager")  # type: ignore[assignment]
    for _ in range(4):
        session.feed([1, 1])


def test_a_rolling_cache_refuses_a_mask_that_reaches_further_and_a_context() -> None:
    x, cache = torch.randn(3, 4, DIM, dtype=torch.float64), KINDS["rolling"].new(v_head_dim=SIZE)
    assert isinstance(cache, RollingCache)
    with pytest.raises(ValueError, match="cache holds what a query needs to see 7 keys; with mask Causal"):
        make(KINDS["contiguous"])(x, cache=cache)
    wide = SlidingWindowAttention(DIM, 2 * HEADS, WINDOW + 1, num_kv_heads=HEADS).double()
    with pytest.raises(ValueError, match="it sees 8 keys up to its own"):
        wide(x, cache=cache)
    with pytest.raises(ValueError, match="with mask None it sees any key before it"):
        make(KINDS["rolling"])(x, context=x, cache=cache)
    assert cache.length == 0


@pytest.mark.parametrize("name", KINDS)
def test_positions_that_go_back_are_refused(name: str) -> None:
    session = start(KINDS[name], rows=2)
    session.feed([5, 3])
    x = session.x[:, :2]
    for positions, message in (
        (torch.tensor([[5, 6], [4, 4]]), r"positions go back: row 1 has \[4, 4\] after 3 tokens"),
        (torch.tensor([[5, 6], [2, 3]]), r"row 1 has \[2, 3\] after 3 tokens .* \(token 0 does not\)"),
        (torch.tensor([5, 4]), r"row 0 has \[5, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            session.layer(x, positions=positions, cache=session.cache)
    assert session.cache.row_lengths() == [5, 3]
    session.layer(x, positions=torch.tensor([[7, 9], [3, 0]]), key_lengths=torch.tensor([2, 1]), cache=session.cache)
