"""Layers with a cache: decode equals prefill, however a sequence is cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from attnzoo.caches import ContiguousCache
from attnzoo.layers import GroupedQueryAttention, RotaryEmbedding
from attnzoo.masks import Causal, SlidingWindow
from tests.support.compare import assert_as_accurate

DIM, HEADS, KV_HEADS, SIZE, ROOM = 24, 4, 2, 6, 64


def make(**options: Any) -> GroupedQueryAttention:
    torch.manual_seed(0)
    options = {"rope": RotaryEmbedding(SIZE, base=100.0), "bias": True, "qk_norm": True, **options}
    return GroupedQueryAttention(DIM, HEADS, KV_HEADS, **options).double()


def new_cache(batch_size: int, room: int = ROOM, dtype: torch.dtype = torch.float64) -> ContiguousCache:
    """An empty cache full of NaN, as memory may be that was used before."""
    cache = ContiguousCache(batch_size, KV_HEADS, room, SIZE, dtype=dtype)
    rubbish = torch.full((batch_size, KV_HEADS, room, SIZE), torch.nan, dtype=dtype)
    cache.append(rubbish, rubbish)
    cache.reset()
    return cache


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


MASKS = [Causal(), SlidingWindow(3), SlidingWindow(1) | SlidingWindow(5) & Causal(), None]


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.sets(st.integers(1, 39), max_size=12), mask=st.sampled_from(MASKS[:3]), softcap=st.sampled_from([None, 2.0])
)
def test_any_cut_into_prefill_chunks_and_steps_gives_the_whole(
    cuts: set[int], mask: Any, softcap: float | None
) -> None:
    layer, x, cache = make(mask=mask, softcap=softcap), tokens(2, 40), new_cache(2, room=40)
    parts = [layer(x[:, a:b], cache=cache) for a, b in pairwise([0, *sorted(cuts), 40])]
    close(torch.cat(parts, dim=1), layer(x))
    assert cache.row_lengths() == [40, 40]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_right_padded_prompts_and_chunks_then_steps_equal_each_row_alone(data: st.DataObject) -> None:
    layer = make(mask=data.draw(st.sampled_from(MASKS[:3])))
    lengths = st.lists(st.integers(0, 20), min_size=3, max_size=3)
    # (tokens of each row, padded or not): prompts, perhaps longer chunks, and steps in which every row gets one.
    chunks = [
        data.draw(lengths),
        *data.draw(st.lists(st.one_of(lengths, st.just([1, 1, 1])), max_size=3)),
        [1] * 3,
        [2] * 3,
    ]
    rows, cache = tokens(3, ROOM), new_cache(3, room=70)
    expected, seen = layer(rows), [0, 0, 0]
    for chunk in chunks:
        if max(seen) + max(chunk) > ROOM or max(chunk) == 0:
            continue
        x = torch.full((3, max(chunk) + data.draw(st.integers(0, 1)), DIM), torch.nan, dtype=torch.float64)
        for row, count in enumerate(chunk):
            x[row, :count] = rows[row, seen[row] : seen[row] + count]
        padded = min(chunk) < x.shape[1]
        out = layer(x, cache=cache, key_lengths=torch.tensor(chunk) if padded else None)
        assert out.isfinite().all()
        for row, count in enumerate(chunk):
            close(out[row, :count], expected[row, seen[row] : seen[row] + count])
            seen[row] += count
        assert cache.row_lengths() == seen


def test_without_a_mask_new_tokens_see_everything_in_the_cache() -> None:
    layer, x, cache = make(mask=None), tokens(2, 9), new_cache(2)
    close(layer(x[:, :5], cache=cache), layer(x[:, :5]))
    close(layer(x[:, 5:], cache=cache), layer(x)[:, 5:])


def test_given_positions_rotate_what_is_appended() -> None:
    layer, x, cache = make(), tokens(2, 7), new_cache(2)
    positions = torch.tensor([[3, 4, 5, 9, 10, 11, 12], [0, 1, 2, 3, 4, 5, 6]])
    parts = [layer(x[:, a:b], positions=positions[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 7))]
    close(torch.cat(parts, dim=1), layer(x, positions=positions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decode_is_prefill_to_the_rounding_of_the_dtype(dtype: torch.dtype) -> None:
    layer, x = make(mask=SlidingWindow(20)), tokens(2, 33)
    exact = layer(x)
    layer, x = layer.to(dtype), x.to(dtype)
    cache = new_cache(2, dtype=dtype)
    steps = [layer(x[:, :16], cache=cache), *(layer(x[:, t : t + 1], cache=cache) for t in range(16, 33))]
    assert_as_accurate("decode", torch.cat(steps, dim=1), layer(x), exact)


def test_reordered_rows_decode_as_the_rows_that_they_were() -> None:
    layer, x, step = make(), tokens(3, 5), tokens(3, 1)
    lengths, order = torch.tensor([5, 2, 4]), torch.tensor([2, 2, 0])
    cache = new_cache(3)
    layer(x, cache=cache, key_lengths=lengths)
    cache.reorder(order)
    out = layer(step, cache=cache)
    for row, source in enumerate(order.tolist()):
        alone = torch.cat([x[source : source + 1, : lengths[source]], step[row : row + 1]], dim=1)
        close(out[row], layer(alone)[0, -1:])


def test_a_context_is_projected_once_and_then_read_from_the_cache() -> None:
    layer, x, context, cache = make(), tokens(3, 6), tokens(3, 5), new_cache(3, room=5)
    calls = []
    layer.k_proj.register_forward_hook(lambda *_: calls.append(1))
    lengths = torch.tensor([5, 1, 3])
    expected = layer(x, context=context, key_lengths=lengths)
    calls.clear()
    parts = [
        layer(
            x[:, a:b],
            context=context if a == 0 else torch.full_like(context, torch.nan),
            key_lengths=lengths,
            cache=cache,
        )
        for a, b in ((0, 3), (3, 4), (4, 6))
    ]
    close(torch.cat(parts, dim=1), expected)
    assert len(calls) == 1
    assert cache.row_lengths() == [5, 1, 3]
    whole = new_cache(3, room=5)
    close(layer(x, context=context, cache=whole), layer(x, context=context))


def test_every_step_compiles_into_one_graph_that_serves_all_later_steps() -> None:
    layer, x = make(), tokens(2, 12)
    expected = layer(x)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled, cache = torch.compile(layer, fullgraph=True, backend=graphs), new_cache(2)
    parts = [compiled(x[:, :4], cache=cache), *(compiled(x[:, t : t + 1], cache=cache) for t in range(4, 12))]
    close(torch.cat(parts, dim=1), expected)
    assert graphs.frame_count <= 4  # the prompt, the first step, the first that knows that lengths vary
    lengths = torch.tensor([4, 2])
    ragged = new_cache(2)
    layer(x[:, :4], key_lengths=lengths, cache=ragged)
    before = None
    for t in range(4, 9):
        out = compiled(x[:, t : t + 1], cache=ragged)
        alone = torch.cat([x[1:, :2], x[1:, 4 : t + 1]], dim=1)
        close(out[1], layer(alone)[0, -1:])
        if t >= 6:
            assert before in (None, graphs.frame_count)
            before = graphs.frame_count


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (ContiguousCache(3, KV_HEADS, 8, SIZE, dtype=torch.float64), "cache is made for batch 3"),
        (ContiguousCache(2, HEADS, 8, SIZE, dtype=torch.float64), "4 heads of 6"),
        (ContiguousCache(2, KV_HEADS, 8, 8, dtype=torch.float64), "2 heads of 8"),
        (ContiguousCache(2, KV_HEADS, 8, SIZE, 4, dtype=torch.float64), r"4 \(values\)"),
        (ContiguousCache(2, KV_HEADS, 8, SIZE, dtype=torch.float32), "this cache is torch.float32"),
        (ContiguousCache(2, KV_HEADS, 3, SIZE, dtype=torch.float64), "cache full"),
    ],
)
@pytest.mark.parametrize("crossed", [False, True])
def test_a_cache_that_does_not_fit_is_refused_and_stays_empty(
    cache: ContiguousCache, message: str, crossed: bool
) -> None:
    x = tokens(2, 4)
    with pytest.raises(ValueError, match=message):
        make()(x, cache=cache, context=x if crossed else None)
    assert cache.length == 0


def test_a_step_into_a_full_cache_fails_and_the_cache_can_be_used_on() -> None:
    layer, x, cache = make(), tokens(1, 5), new_cache(1, room=4)
    layer(x[:, :3], cache=cache)
    with pytest.raises(ValueError, match="cache full"):
        layer(x[:, 3:], cache=cache)
    close(layer(x[:, 3:4], cache=cache), layer(x[:, :4])[:, 3:])


def test_what_cannot_go_with_a_cache_is_refused() -> None:
    x, cache = tokens(1, 4), new_cache(1)
    with pytest.raises(ValueError, match="cache given with cu_seqlens"):
        make()(x, cache=cache, cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"key_lengths is \[5\]"):
        make()(x, cache=cache, key_lengths=torch.tensor([5]))
    with pytest.raises(ValueError, match="call eval"):
        make(dropout=0.1)(x, cache=cache)
    assert cache.length == 0
    close(make(dropout=0.1).eval()(x, cache=cache), make()(x))
