"""Rolling caches that hold the first tokens besides: what they show, after any history, is what masks of them need."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from attnzoo import GroupedQueryAttention
from attnzoo.caches import ContiguousCache, RollingCache
from attnzoo.hf.generation.device import Clock, OnDevice
from attnzoo.masks import Causal, GlobalTokens, Mask, SlidingWindow
from attnzoo.ops import decode
from attnzoo.ops.decoding import is_relative
from attnzoo.ops.decoding.reach import reach
from attnzoo.ops.decoding.reference import decode_reference
from tests.caches.kinds import HEADS, K_SIZE, V_SIZE, new_tokens, poison

FIRST, WINDOW, MARGIN = 3, 5, 2


def both(first: int = FIRST, window: int = WINDOW) -> Mask:
    return SlidingWindow(window) | (GlobalTokens(first) & Causal())


def new_cache(batch: int = 2, **options: int) -> RollingCache:
    sizes = {"window": WINDOW, "margin": MARGIN, "prefix": FIRST} | options
    cache = RollingCache(batch, HEADS, head_dim=K_SIZE, v_head_dim=V_SIZE, dtype=torch.float64, **sizes)
    poison(cache)
    return cache


def q_of(batch: int, count: int) -> Tensor:
    return torch.randn(batch, 2 * HEADS, count, K_SIZE, dtype=torch.float64)


class History:
    """Every row's tokens, whatever the cache has dropped; attention over it is the textbook's."""

    def __init__(self, batch: int) -> None:
        self.k, self.v = (torch.zeros(batch, HEADS, 0, size, dtype=torch.float64) for size in (K_SIZE, V_SIZE))
        self.lengths = [0] * batch

    def append(self, k: Tensor, v: Tensor, counts: list[int]) -> None:
        most = max(length + count for length, count in zip(self.lengths, counts, strict=True))
        parts = [torch.zeros(*old.shape[:2], most, old.shape[3], dtype=old.dtype) for old in (self.k, self.v)]
        for part, old, new in zip(parts, (self.k, self.v), (k, v), strict=True):
            for row, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
                part[row, :, :length] = old[row, :, :length]
                part[row, :, length : length + count] = new[row, :, :count]
        self.k, self.v = parts
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def attended(self, q: Tensor, starts: list[int], mask: Mask) -> Tensor:
        return decode_reference(q, self.k, self.v, self.lengths, starts, mask=mask, scale=0.5)


@pytest.mark.parametrize("seed", range(12))
def test_any_history_of_chunks_crops_and_moves_shows_what_the_mask_needs(seed: int) -> None:
    rng, cache, history = random.Random(seed), new_cache(3), History(3)
    for _ in range(14):
        even, new = rng.random() < 0.5, rng.choice([1, 1, 1, 2, 3, 4, 9, 17])
        counts = [new if even else rng.randint(0, new) for _ in range(3)]
        starts, (k, v), q = list(history.lengths), new_tokens(3, new), q_of(3, new)
        seen = cache.extend(k, v, None if even else torch.tensor(counts))
        history.append(k, v, counts)
        poison(cache)
        given = {"scale": 0.5, "starts": torch.tensor(starts)}
        for mask in (both(), both(1), SlidingWindow(WINDOW)):
            want = history.attended(q, starts, mask)
            torch.testing.assert_close(decode(q, seen, mask=mask, **given), want, rtol=0, atol=1e-12)
            got = decode(q, seen, mask=mask, backend="reference", **given)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        if rng.random() < 0.3:
            order = torch.tensor([rng.randrange(3) for _ in range(3)])
            cache.reorder(order)
            history.k, history.v = history.k[order], history.v[order]
            history.lengths = [history.lengths[row] for row in order]
        if rng.random() < 0.3:
            dropped = any(length > cache._ring.size for length in history.lengths)
            least = 0 if dropped else rng.randint(0, 4)
            history.lengths = [min(length, least) for length in history.lengths]
            cache.crop(least)
            poison(cache)


@pytest.mark.parametrize("prompt", [1, 2, 9, 30])
def test_steps_that_count_on_the_device_write_first_tokens_too(prompt: int) -> None:
    cache, history = new_cache(2, margin=0), History(2)
    k, v = new_tokens(2, prompt)
    lengths = [prompt, max(prompt - 1, 1)]
    cache.append(k, v, torch.tensor(lengths))
    history.append(k, v, lengths)
    clock = Clock(lengths, k.device)
    steps = OnDevice(cache, clock, 64)
    for _ in range(12):
        (k, v), q = new_tokens(2, 1), q_of(2, 1)
        starts = list(history.lengths)
        steps.write(k, v)
        history.append(k, v, [1, 1])
        for mask in (both(), SlidingWindow(WINDOW)):
            out = decode(q, steps, mask=mask, scale=0.5, starts=clock.before)
            torch.testing.assert_close(out, history.attended(q, starts, mask), rtol=0, atol=1e-12)
        clock.tick()
    steps.count(12)
    poison(cache)
    assert cache.row_lengths() == history.lengths
    for row, length in enumerate(history.lengths):
        keys = cache.view()[0][row, :, : min(length, WINDOW + FIRST)]
        near = history.k[row, :, max(length - WINDOW, FIRST) : length]
        assert torch.equal(keys, torch.cat([history.k[row, :, :FIRST], near], dim=1)[:, : keys.shape[1]])


def test_a_layer_reads_a_ring_as_it_reads_everything() -> None:
    layer = GroupedQueryAttention(16, 4, 2, mask=both()).double()
    sizes = {"num_kv_heads": 2, "head_dim": 4, "dtype": torch.float64}
    rolling = RollingCache(2, window=WINDOW, prefix=FIRST, **sizes)
    whole = ContiguousCache(2, max_length=40, **sizes)
    x = torch.randn(2, 31, 16, dtype=torch.float64)
    with torch.no_grad():
        for start, end in pairwise([0, 13, 14, 15, 24, 25, 31]):
            got, want = (layer(x[:, start:end], cache=cache) for cache in (rolling, whole))
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert rolling.nbytes == whole.nbytes // 40 * (WINDOW + FIRST)


def test_masks_that_need_more_than_is_held_are_refused() -> None:
    cache = new_cache()
    cache.append(*new_tokens(2, 30))
    for mask in (both(FIRST + 1), both(FIRST, WINDOW + MARGIN + 1), GlobalTokens(FIRST) | Causal(), Causal()):
        with pytest.raises(ValueError, match="the cache would have to hold more than the last 7 of 30 tokens"):
            decode(q_of(2, 1), cache, mask=mask)
    decode(q_of(2, 1), cache, mask=GlobalTokens(2) & Causal())


def test_first_tokens_count_as_near_where_they_are_held() -> None:
    assert reach(both()) is None and not is_relative(both())
    assert reach(both(), FIRST) == WINDOW and is_relative(both(), FIRST)
    assert reach(both(), FIRST - 1) is None and not is_relative(both(), FIRST - 1)
    assert reach(SlidingWindow(9), FIRST) == 9 and reach(Causal(), FIRST) is None
