"""The recurrent state cache against a list of rows whose tokens are all still there, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnzoo import ops
from attnzoo.caches import RecurrentStateCache

HEADS, SIZE, V_SIZE = 2, 3, 2
LOG_DECAY = torch.tensor([-0.2, -0.01], dtype=torch.float64)

KINDS: list[dict[str, Any]] = [
    {"rollback": 0},
    {"rollback": 3, "log_decay": LOG_DECAY, "feature_map": "elu"},
    {"rollback": 2, "normalize": False, "log_decay": LOG_DECAY},
    {"window": 4, "feature_map": "elu"},
    {"window": 3, "rollback": 2, "key_dim": 5},
    {"window": 1},
]


def make(batch: int = 3, **kind: Any) -> RecurrentStateCache:
    return RecurrentStateCache(batch, HEADS, SIZE, V_SIZE, dtype=torch.float64, **kind)


def draw_tokens(batch: int, count: int, key_dim: int | None) -> list[Tensor]:
    """Queries, raw keys, features of both, values."""
    near = SIZE if key_dim is None else key_dim
    sizes = ((2 * HEADS, near), (HEADS, near), (2 * HEADS, SIZE), (HEADS, SIZE), (HEADS, V_SIZE))
    drawn = [torch.randn(batch, heads, count, size, dtype=torch.float64) for heads, size in sizes]
    if key_dim is None:
        drawn[2:4] = drawn[:2]
    else:
        drawn[2:4] = [t.softmax(-1) for t in drawn[2:4]]
    return drawn


def whole(tokens: list[Tensor], cache: RecurrentStateCache) -> Tensor:
    """The output of one full pass over a row's tokens `[H, S, D]`."""
    q, k, f_q, f_k, v = (t[None] for t in tokens)
    options = {"feature_map": cache.feature_map, "backend": "reference"}
    if cache.window is not None:
        return ops.hybrid_attention(q, k, v, window=cache.window, q_features=f_q, k_features=f_k, **options)[0]
    return ops.linear_attention(f_q, f_k, v, normalize=cache.normalize, log_decay=cache.log_decay, **options)[0]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(KINDS))
def test_any_sequence_of_operations_gives_what_one_full_pass_would(data: st.DataObject, kind: dict[str, Any]) -> None:
    cache = make(**kind)
    rows = [[t[0] for t in draw_tokens(1, 0, cache.key_dim)] for _ in range(3)]
    longest = [0] * 3
    for _ in range(data.draw(st.integers(1, 9))):
        size = len(rows)
        actions = ["decode", "decode", "decode", "padded", "append", "crop", "reorder", "select", "repeat"]
        action = data.draw(st.sampled_from(actions))
        if action in ("decode", "padded", "append"):
            count = data.draw(st.sampled_from([0, 1, 1, 2, 3, 5, 8, 17]))
            counts = [count] * size
            new = draw_tokens(size, count, cache.key_dim)
            if action == "padded":
                counts = data.draw(st.lists(st.integers(0, count), min_size=size, max_size=size))
                for b, real in enumerate(counts):
                    for t in new:
                        t[b, :, real:] = torch.nan
            lengths = torch.tensor(counts) if action == "padded" else None
            q, k, f_q, f_k, v = new
            rows = [
                [torch.cat([old, t[b, :, : counts[b]]], dim=1) for old, t in zip(row, new, strict=True)]
                for b, row in enumerate(rows)
            ]
            longest = [max(most, row[0].shape[1]) for most, row in zip(longest, rows, strict=True)]
            if action == "append":
                cache.append(f_k, v, keys=k if cache.key_dim else None)
            else:
                out = ops.linear_decode(q, k, v, cache, q_features=f_q, k_features=f_k, lengths=lengths)
                for b, row in enumerate(rows):
                    want = whole(row, cache)[:, row[0].shape[1] - counts[b] :]
                    torch.testing.assert_close(out[b, :, : counts[b]], want, rtol=1e-9, atol=1e-9)
                    assert (out[b, :, counts[b] :] == 0).all()
        elif action == "crop":
            length = data.draw(st.integers(0, max(row[0].shape[1] for row in rows)))
            before = cache.row_lengths()
            lost = [max(0, row - length) for row in before]
            past = [most - min(row, length) for most, row in zip(longest, before, strict=True)]
            try:
                cache.crop(length)
            except ValueError as refusal:
                assert "can only be cropped to" in str(refusal)
                assert any(n > 0 and m > cache.rollback for n, m in zip(lost, past, strict=True))
                assert cache.row_lengths() == before
                continue
            rows = [[t[:, :length] for t in row] for row in rows]
            longest = [0] * size if length == 0 else longest
        elif action == "repeat":
            count = data.draw(st.integers(1, 2)) if size < 4 else 1
            cache.repeat(count)
            rows, longest = ([one for one in each for _ in range(count)] for each in (rows, longest))
        else:
            few = size if action == "reorder" else data.draw(st.integers(1, 4))
            indices = data.draw(st.lists(st.integers(0, size - 1), min_size=few, max_size=few))
            (cache.reorder if action == "reorder" else cache.select)(torch.tensor(indices))
            rows, longest = ([each[index] for index in indices] for each in (rows, longest))
        lengths_now = [row[0].shape[1] for row in rows]
        assert cache.row_lengths() == lengths_now == cache.lengths.tolist()
        assert cache.length == max(lengths_now) and cache.uniform == (len(set(lengths_now)) == 1)
        assert cache.batch_size == len(rows)


@pytest.mark.parametrize("kind", [{"rollback": 4}, {"window": 3, "rollback": 4}], ids=str)
def test_speculative_tokens_that_are_cropped_leave_no_trace(kind: dict[str, Any]) -> None:
    cache, tokens = make(**kind), draw_tokens(3, 60, None)

    def decode(start: int, end: int, noise: float = 0.0) -> Tensor:
        q, k, v = (tokens[i][:, :, start:end] + noise for i in (0, 1, 4))
        return ops.linear_decode(q, k, v, cache)

    decode(0, 21)
    at = 21
    while at < 50:
        decode(at, at + 4, noise=1.0)
        cache.crop(at + 1 if at % 2 else at)  # one accepted by mistake: take it back too
        cache.crop(at)
        out = decode(at, at + 2)
        want = torch.stack([whole([t[b, :, : at + 2] for t in tokens], cache)[:, at:] for b in range(3)])
        torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9)
        at += 2


def test_the_size_never_grows_and_sums_are_fp32() -> None:
    cache = RecurrentStateCache(1, 1, 4, window=5, rollback=2, dtype=torch.bfloat16)
    sizes = []
    for _ in range(3):
        tokens = torch.randn(1, 1, 40, 4, dtype=torch.bfloat16)
        ops.linear_decode(tokens, tokens, tokens, cache)
        held = [*cache.state, cache.tail.keys, cache.tail.v]
        sizes.append(sum(t.untyped_storage().nbytes() for t in held))
    assert len(set(sizes)) == 1 and sizes[0] == (16 + 4) * 4 + 2 * 6 * 4 * 2
    assert cache.state.s.dtype == cache.state.z.dtype == torch.float32 and cache.dtype == torch.bfloat16


def test_gradients_reach_new_tokens_and_stop_at_the_cache() -> None:
    for kind in ({"rollback": 0}, {"rollback": 2}):
        cache = make(**kind)
        for _ in range(2):
            q, k, v = (t.requires_grad_() for t in draw_tokens(3, 3, None)[:2] + draw_tokens(3, 3, None)[4:])
            ops.linear_decode(q, k, v, cache).sum().backward()
            assert q.grad is not None and k.grad is not None and v.grad.abs().sum() > 0
        assert not any(t.requires_grad for t in (*cache.state, *cache.tail))


def test_a_cache_without_a_tail_is_stepped_in_place() -> None:
    cache, tokens = make(), draw_tokens(3, 5, None)
    address = cache.state.s.data_ptr()
    ops.linear_decode(tokens[0], tokens[1], tokens[4], cache)
    assert cache.state.s.data_ptr() == address and cache.length == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.ones(2, HEADS, 1, SIZE)}, r"k has shape \[2, 2, 1, 3\]; this cache takes \[3, 2, S, 3\]"),
        ({"v": torch.ones(3, HEADS, 2, V_SIZE)}, "v has shape"),
        ({"k": torch.ones(3, HEADS, 1, SIZE).half()}, "k is torch.float16"),
        ({"lengths": torch.tensor([0, 1, 2])}, r"lengths is \[0, 1, 2\]; each must be from 0 to 1"),
        ({"keys": None}, "keys is None; this cache takes keys of size 5"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_and_nothing_is_written(change: dict[str, Any], message: str) -> None:
    cache = RecurrentStateCache(3, HEADS, SIZE, V_SIZE, window=2, key_dim=5)
    given: dict[str, Any] = {"k": torch.ones(3, HEADS, 1, SIZE), "v": torch.ones(3, HEADS, 1, V_SIZE)}
    given["keys"] = torch.ones(3, HEADS, 1, 5)
    with pytest.raises(ValueError, match=message):
        cache.append(**{**given, **change})
    assert cache.length == 0 and not cache.state.s.any() and not cache.tail.v.any()


def test_what_cannot_be_is_refused_by_name() -> None:
    cache = make(rollback=2)
    tokens = draw_tokens(3, 9, None)
    cache.append(tokens[3], tokens[4])
    calls: list[tuple[Any, str]] = [
        (lambda: make(batch=0), "batch_size is 0"),
        (lambda: make(rollback=-1), "rollback is -1"),
        (lambda: make(window=0), "window is 0"),
        (lambda: make(window=3, normalize=False), "window is 3; it must be at least 1, with a normaliser"),
        (lambda: make(key_dim=3), "key_dim is 3 without a window"),
        (lambda: make(feature_map="favor"), "feature_map is 'favor'"),
        (lambda: cache.view(), "a recurrent state holds no keys and values"),
        (lambda: cache.crop(-1), "length is -1"),
        (lambda: cache.crop(6), "length is 6; a row of 9 tokens has 7 of them summed up and can only be cropped to 7"),
        (lambda: cache.repeat(0), "count is 0"),
        (lambda: cache.reorder(torch.tensor([0, 1])), r"indices has shape \[2\]"),
        (lambda: cache.select(torch.tensor([3])), r"indices is \[3\]; each must be from 0 to 2"),
        (lambda: cache.select(torch.tensor([True])), "indices is torch.bool"),
        (lambda: ops.linear_decode(*tokens[:2], tokens[4], cache, near_weight=torch.ones(4)), "near_weight given"),
        (lambda: ops.linear_decode(tokens[0][:, :3], tokens[1], tokens[4], cache), "q must be"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
    assert cache.length == 9
    cache.crop(7)
    cache.crop(0)
    assert cache.length == 0 and not cache.state.s.any()
