"""The rolling cache: what it lets go, what it shows of long chunks, what may be cropped, which masks it can serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo.caches import RollingCache
from attnzoo.caches.places import places
from attnzoo.masks import Causal, Dilated, Documents, Full, PerHead, SlidingWindow
from attnzoo.ops import decode
from attnzoo.ops.decoding.reach import is_relative, reach
from attnzoo.ops.decoding.reference import decode_reference
from tests.caches.kinds import HEADS, K_SIZE, KINDS, new_tokens, poison


def new_cache(margin: int = 0, window: int = 5) -> RollingCache:
    cache = KINDS["rolling"].new(2, window=window, margin=margin)
    assert isinstance(cache, RollingCache)
    return cache


def q_of(count: int) -> Tensor:
    return torch.randn(2, 2 * HEADS, count, K_SIZE, dtype=torch.float64)


def test_a_cropped_token_comes_back_only_as_far_as_the_margin_goes() -> None:
    cache, (k, v) = new_cache(margin=3), new_tokens(2, 40)
    cache.append(k, v)
    cache.crop(38)
    with pytest.raises(
        ValueError, match=r"length is 36 for row 0, which has 38 tokens .* can be cropped to 37 or more"
    ):
        cache.crop(36)
    cache.crop(37)  # the margin is used up
    assert cache.kept == 5 and cache.first == 32
    poison(cache)
    assert torch.equal(cache.view()[0], k[:, :, 32:37])
    with pytest.raises(ValueError, match="cropped to 37 or more"):
        cache.crop(torch.tensor([37, 36]))
    cache.append(*new_tokens(2, 2))
    cache.crop(37)  # as many as were appended since
    cache.crop(0)
    cache.append(k[:, :, :6], v[:, :, :6])
    cache.crop(2)  # nothing has been dropped yet, so anything can be cropped
    assert cache.row_lengths() == [2, 2] and torch.equal(cache.view()[0], k[:, :, :2])


@pytest.mark.parametrize("before", [0, 3, 5, 23])
def test_a_long_chunk_is_seen_whole_and_then_let_go(before: int) -> None:
    cache, (k, v), q = new_cache(), new_tokens(2, 60), q_of(60)
    cache.append(k[:, :, :before], v[:, :, :before])
    seen = cache.extend(k[:, :, before:], v[:, :, before:])
    expected = decode_reference(q, k, v, [60, 60], [0, 0], mask=SlidingWindow(5), scale=0.5)
    out = decode(q[:, :, before:], seen, mask=SlidingWindow(5))
    torch.testing.assert_close(out, expected[:, :, before:], rtol=0, atol=1e-12)
    assert seen is not cache and seen.view()[0].shape[2] == min(before, 5) + 60 - before
    assert cache.view()[0].shape[2] == 5 and cache.first == 55
    with pytest.raises(
        ValueError, match="with 2 queries the cache would have to hold more than the last 5 of 60 tokens"
    ):
        decode(q[:, :, -2:], cache, mask=SlidingWindow(5))


@pytest.mark.parametrize("real", [0, 3, 9])
def test_padding_of_a_first_long_chunk_is_not_seen_though_all_rows_are_alike(real: int) -> None:
    cache, (k, v), q = new_cache(), new_tokens(2, 20), q_of(20)
    k[:, :, real:], v[:, :, real:] = torch.nan, torch.nan
    seen = cache.extend(k, v, torch.tensor([real, real]))
    expected = decode_reference(q, k, v, [real, real], [0, 0], mask=SlidingWindow(5), scale=0.5)
    torch.testing.assert_close(decode(q, seen, mask=SlidingWindow(5), starts=0), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("counts", [None, [17, 0, 5]])
def test_no_slot_is_written_twice_by_one_append(counts: list[int] | None) -> None:
    at = places(torch.tensor([3, 0, 9]), 17, counts, 3, torch.device("cpu"), last=5)
    rows, positions = torch.broadcast_tensors(at.rows, at.positions)
    written = list(zip(rows.flatten().tolist(), (positions % 5).flatten().tolist(), strict=True))
    assert len(set(written)) == len(written) == sum(min(count, 5) for count in counts or [17] * 3)


# Documents stand at absolute positions, so `decode` must not count from the first key that is still there.
MASKS = [
    SlidingWindow(5),
    SlidingWindow(5) & Documents((0, 12, 33, 60)),
    Dilated(2, 4),
    SlidingWindow(3) | Dilated(3, 2),
    PerHead([SlidingWindow(1), SlidingWindow(5) & Documents((0, 30, 60)), Dilated(2, 3), SlidingWindow(4)]),
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("lengths", [[40, 40], [40, 11], [20, 3]])
@pytest.mark.parametrize("queries", [1, 3, 20])
def test_masks_count_absolute_positions_though_tokens_were_dropped(mask: Any, lengths: list[int], queries: int) -> None:
    cache, (k, v), q = new_cache(margin=2), new_tokens(2, 60), q_of(queries)
    ends = torch.tensor(lengths)
    cache.append(k, v, ends)
    poison(cache)
    more_k, more_v = new_tokens(2, queries)
    seen = cache.extend(more_k, more_v)
    whole_k, whole_v = (torch.full((2, HEADS, 60, t.shape[3]), torch.nan, dtype=torch.float64) for t in (k, v))
    for b, end in enumerate(lengths):
        for whole, old, new in ((whole_k, k, more_k), (whole_v, v, more_v)):
            whole[b, :, : end + queries] = torch.cat([old[b, :, :end], new[b]], dim=1)
    total = [end + queries for end in lengths]
    out = decode(q, seen, mask=mask, starts=lengths[0] if len(set(lengths)) == 1 else ends)
    for h in range(2 * HEADS):  # the textbook knows one mask for all heads, so it is asked head by head
        expected = decode_reference(q, whole_k, whole_v, total, lengths, mask=mask.head(h), scale=0.5)
        torch.testing.assert_close(out[:, h], expected[:, h], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("mask", "far", "relative"),
    [
        (None, None, False),
        (Full(), None, True),
        (Causal(), None, True),
        (SlidingWindow(4, 2), 4, True),
        (Dilated(3, 4), 9, True),
        (SlidingWindow(4) | Dilated(3, 4), 9, True),
        (SlidingWindow(4) | Causal(), None, True),
        (SlidingWindow(4) & Dilated(3, 4), 4, True),
        (SlidingWindow(4) & Documents((0, 5)), 4, False),
        (Documents((0, 5)), None, False),
        (PerHead([SlidingWindow(4), Dilated(3, 2)]), 5, True),
        (PerHead([SlidingWindow(4), Causal()]), None, True),
    ],
)
def test_how_far_a_mask_reaches_is_known_or_admitted_not_to_be(mask: Any, far: int | None, relative: bool) -> None:
    assert reach(mask) == far
    assert mask is None or is_relative(mask) == relative
    if far is not None:
        back = torch.arange(30)[:, None] - torch.arange(30)[None, :]
        assert not (mask.dense(30, 30) & (back >= far)).any()


def test_a_mask_without_a_bound_is_refused_once_tokens_were_dropped() -> None:
    cache = new_cache()
    cache.append(*new_tokens(2, 5))
    assert decode(q_of(1), cache, mask=Causal()).isfinite().all()
    cache.append(*new_tokens(2, 1))
    for mask in (Causal(), None, SlidingWindow(6)):
        with pytest.raises(ValueError, match="more than the last 5 of 6 tokens"):
            decode(q_of(1), cache, mask=mask)
