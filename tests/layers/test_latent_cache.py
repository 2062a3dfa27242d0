"""Latent attention with a cache: decode equals prefill in either form, however a sequence is cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from attnzoo.caches import Cache, ContiguousCache, Int8Cache, PagedCache, RollingCache
from attnzoo.masks import Causal, PerHead, SlidingWindow
from tests.layers.latent import DIM, FORMS, RANK, ROOM, ROPE, close, make, new_cache, tokens
from tests.support.compare import assert_as_accurate

MASKS = [Causal(), SlidingWindow(4), PerHead((SlidingWindow(2), Causal(), SlidingWindow(4)))]


@settings(max_examples=20, deadline=None)
@given(
    cuts=st.sets(st.integers(1, 29), max_size=9),
    forms=st.lists(st.sampled_from(FORMS), min_size=10, max_size=10),
    mask=st.sampled_from(MASKS),
    wasted=st.lists(st.integers(0, 4), min_size=10, max_size=10),
)
def test_any_cut_into_prefill_chunks_steps_and_rejected_guesses_gives_the_whole(
    cuts: set[int], forms: list[Any], mask: Any, wasted: list[int]
) -> None:
    layer, x, cache, parts = make(mask=mask), tokens(2, 30), new_cache(2), []
    for (a, b), form, extra in zip(pairwise([0, *sorted(cuts), 30]), forms, wasted, strict=False):
        guessed = torch.cat([x[:, a:b], tokens(2, extra)], dim=1)  # speculative steps: the last ones are rejected
        parts.append(layer(guessed, cache=cache, form=form)[:, : b - a])
        cache.crop(b)
    close(torch.cat(parts, dim=1), layer(x))
    assert cache.row_lengths() == [30, 30]


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_right_padded_prompts_and_chunks_then_steps_equal_each_row_alone(data: st.DataObject) -> None:
    layer = make(mask=data.draw(st.sampled_from(MASKS)))
    lengths = st.lists(st.integers(0, 18), min_size=3, max_size=3)
    chunks = [data.draw(lengths), *data.draw(st.lists(lengths, max_size=2)), [1] * 3, [2] * 3]
    rows, cache, seen = tokens(3, ROOM), new_cache(3, room=ROOM + 4), [0, 0, 0]
    expected = layer(rows)
    for chunk in chunks:
        if max(seen) + max(chunk) > ROOM or max(chunk) == 0:
            continue
        x = torch.full((3, max(chunk) + data.draw(st.integers(0, 1)), DIM), torch.nan, dtype=torch.float64)
        for row, count in enumerate(chunk):
            x[row, :count] = rows[row, seen[row] : seen[row] + count]
        padded = min(chunk) < x.shape[1]
        form = data.draw(st.sampled_from(FORMS))
        out = layer(x, cache=cache, key_lengths=torch.tensor(chunk) if padded else None, form=form)
        assert out.isfinite().all()
        for row, count in enumerate(chunk):
            close(out[row, :count], expected[row, seen[row] : seen[row] + count])
            seen[row] += count
        assert cache.row_lengths() == seen


@pytest.mark.parametrize("form", FORMS)
def test_other_caches_of_one_head_do_the_same(form: Any) -> None:
    layer, x, sizes = make(mask=SlidingWindow(5)), tokens(2, 24), (RANK, ROPE)
    caches: list[tuple[Cache, float]] = [
        (ContiguousCache(2, 1, 24, *sizes, dtype=torch.float64), 1e-12),
        (PagedCache(2, 1, 8, *sizes, page_size=16, dtype=torch.float64), 1e-12),
        (RollingCache(2, 1, 5, *sizes, dtype=torch.float64), 1e-12),
        (Int8Cache(2, 1, 24, *sizes, residual=2, dtype=torch.float64), 0.02),
    ]
    for cache, tolerance in caches:
        cuts = [0, 9, 15, 16, 17, 20, *range(21, 25)]  # chunks longer than the window among them
        parts = [layer(x[:, a:b], cache=cache, form=form) for a, b in pairwise(cuts)]
        torch.testing.assert_close(torch.cat(parts, dim=1), layer(x), rtol=0, atol=tolerance)


def test_a_cache_that_drops_what_the_mask_shows_and_positions_that_go_back_are_refused() -> None:
    layer, x, cache = make(), tokens(1, 4), RollingCache(1, 1, 5, RANK, ROPE, dtype=torch.float64)
    with pytest.raises(ValueError, match="cache holds what a query needs to see 5 keys"):
        layer(x, cache=cache)
    held = new_cache(1)
    layer(x, cache=held)
    with pytest.raises(ValueError, match="positions go back"):
        layer(x, cache=held, positions=torch.tensor([3, 4, 5, 6]))
    assert cache.length == 0 and held.length == 4


def test_given_positions_rotate_what_is_appended() -> None:
    layer, x, cache = make(), tokens(2, 7), new_cache(2)
    positions = torch.tensor([[3, 4, 5, 9, 10, 11, 12], [0, 1, 2, 3, 4, 5, 6]])
    parts = [layer(x[:, a:b], positions=positions[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 7))]
    close(torch.cat(parts, dim=1), layer(x, positions=positions))


@pytest.mark.parametrize("form", ["materialised", "absorbed"])
def test_beams_and_samples_decode_as_the_rows_that_they_were(form: Any) -> None:
    layer, x, step, cache = make(), tokens(3, 5), tokens(4, 1), new_cache(3)
    lengths = torch.tensor([5, 2, 4])
    layer(x, cache=cache, key_lengths=lengths)
    cache.reorder(torch.tensor([2, 2, 0]))
    cache.select(torch.tensor([1, 2]))
    cache.repeat(2)
    out = layer(step, cache=cache, form=form)
    for row, source in enumerate([2, 2, 0, 0]):
        alone = torch.cat([x[source : source + 1, : lengths[source]], step[row : row + 1]], dim=1)
        close(out[row], layer(alone)[0, -1:])


def test_a_step_reads_latents_and_makes_no_keys() -> None:
    layer, x, cache, expanded = make(), tokens(1, 13), new_cache(1), []
    layer.kv_b_proj.register_forward_hook(lambda module, args, out: expanded.append(out.shape[1]))
    layer(x[:, :10], cache=cache)
    assert expanded == [10]  # the prompt
    layer(x[:, 10:11], cache=cache)
    layer(x[:, 11:13], cache=cache)
    assert expanded == [10]
    layer(x, cache=new_cache(1), form="absorbed")
    assert expanded == [10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_is_prefill_to_the_rounding_of_the_dtype(dtype: torch.dtype) -> None:
    layer, x = make(), tokens(2, 33)
    exact = layer(x)
    layer, x = layer.to(dtype), x.to(dtype)
    cache = new_cache(2, dtype=dtype)
    steps = [layer(x[:, :16], cache=cache), *(layer(x[:, t : t + 1], cache=cache) for t in range(16, 33))]
    # Queries and sums pass through the latent space in this dtype, which prefill's do not.
    assert_as_accurate("decode", torch.cat(steps, dim=1), layer(x, form="absorbed"), exact)
    assert_as_accurate("absorbed", layer(x, form="absorbed"), layer(x), exact, slack=1.5)


def test_without_a_mask_new_tokens_see_everything_in_the_cache() -> None:
    layer, x, cache = make(mask=None), tokens(2, 9), new_cache(2)
    close(layer(x[:, :5], cache=cache), layer(x[:, :5]))
    close(layer(x[:, 5:], cache=cache), layer(x)[:, 5:])


def test_every_step_compiles_into_one_graph_that_serves_all_later_steps() -> None:
    layer, x = make(), tokens(2, 12)
    expected = layer(x)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled, cache = torch.compile(layer, fullgraph=True, backend=graphs), new_cache(2)
    parts = [compiled(x[:, :4], cache=cache), *(compiled(x[:, t : t + 1], cache=cache) for t in range(4, 12))]
    close(torch.cat(parts, dim=1), expected)
    assert graphs.frame_count <= 4  # the prompt, the first step, the first that knows that lengths vary
    ragged, before = new_cache(2), 0
    layer(x[:, :4], key_lengths=torch.tensor([4, 2]), cache=ragged)
    for t in range(4, 9):
        out = compiled(x[:, t : t + 1], cache=ragged)
        close(out[1], layer(torch.cat([x[1:, :2], x[1:, 4 : t + 1]], dim=1))[0, -1:])
        assert t < 7 or before == graphs.frame_count
        before = graphs.frame_count
