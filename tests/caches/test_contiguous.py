"""The contiguous cache against a list of rows, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnzoo.caches import Cache, ContiguousCache

HEADS, ROOM, K_SIZE, V_SIZE = 2, 9, 3, 2


def new_cache(batch_size: int = 3, device: str = "cpu") -> ContiguousCache:
    return ContiguousCache(batch_size, HEADS, ROOM, K_SIZE, V_SIZE, dtype=torch.float32, device=device)


def new_tokens(batch_size: int, count: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    return (
        torch.randn(batch_size, HEADS, count, K_SIZE, device=device),
        torch.randn(batch_size, HEADS, count, V_SIZE, device=device),
    )


def assert_holds(cache: Cache, rows: list[tuple[Tensor, Tensor]]) -> None:
    lengths = [k.shape[1] for k, _ in rows]
    assert cache.row_lengths() == lengths == cache.lengths.tolist()
    assert cache.length == max(lengths)
    assert cache.uniform == (len(set(lengths)) == 1)
    assert cache.batch_size == len(rows)
    keys, values = cache.view()
    assert keys.shape == (len(rows), HEADS, max(lengths), K_SIZE)
    assert values.shape == (len(rows), HEADS, max(lengths), V_SIZE)
    for row, (k, v) in enumerate(rows):
        assert torch.equal(keys[row, :, : lengths[row]], k)
        assert torch.equal(values[row, :, : lengths[row]], v)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sequence_of_operations_leaves_what_a_list_of_rows_would_hold(data: st.DataObject) -> None:
    batch_size = 3
    cache = new_cache(batch_size)
    empty = torch.empty(HEADS, 0, K_SIZE), torch.empty(HEADS, 0, V_SIZE)
    rows = [empty] * batch_size
    for _ in range(data.draw(st.integers(1, 8))):
        size = len(rows)
        action = data.draw(
            st.sampled_from(["append", "append", "padded", "padded", "crop", "reorder", "select", "repeat"])
        )
        if action in ("append", "padded"):
            count = data.draw(st.integers(0, 5))
            counts = [count] * size
            k, v = new_tokens(size, count)
            if action == "padded":
                counts = data.draw(st.lists(st.integers(0, count), min_size=size, max_size=size))
                for row, real in enumerate(counts):
                    k[row, :, real:], v[row, :, real:] = torch.nan, torch.nan
            lengths = torch.tensor(counts) if action == "padded" else None
            if any(row[0].shape[1] + real > ROOM for row, real in zip(rows, counts, strict=True)):
                with pytest.raises(ValueError, match="cache full"):
                    cache.append(k, v, lengths)
            else:
                cache.append(k, v, lengths)
                rows = [
                    (torch.cat([row[0], k[b, :, :real]], 1), torch.cat([row[1], v[b, :, :real]], 1))
                    for b, (row, real) in enumerate(zip(rows, counts, strict=True))
                ]
        elif action == "crop":
            length = data.draw(st.integers(0, ROOM))
            cache.crop(length)
            rows = [(k[:, :length], v[:, :length]) for k, v in rows]
        elif action == "repeat":
            count = data.draw(st.integers(1, 2)) if size < 4 else 1
            cache.repeat(count)
            rows = [row for row in rows for _ in range(count)]
        else:
            few = size if action == "reorder" else data.draw(st.integers(1, 4))
            indices = data.draw(st.lists(st.integers(0, size - 1), min_size=few, max_size=few))
            (cache.reorder if action == "reorder" else cache.select)(torch.tensor(indices))
            rows = [rows[index] for index in indices]
        assert_holds(cache, rows)
    cache.reset()
    assert_holds(cache, [empty] * len(rows))


def test_rows_of_one_length_never_wait_for_the_device() -> None:
    cache = new_cache(device="meta")  # a device whose values cannot be read at all
    cache.append(*new_tokens(3, 4, "meta"))
    cache.append(*new_tokens(3, 1, "meta"))
    cache.reorder(torch.zeros(3, dtype=torch.int64, device="meta"))
    cache.crop(3)
    assert (cache.length, cache.uniform, cache.row_lengths()) == (3, True, [3, 3, 3])
    assert cache.lengths.shape == (3,)


def test_a_step_after_padded_prompts_never_waits_for_the_device() -> None:
    cache = new_cache()
    cache.append(*new_tokens(3, 4), torch.tensor([4, 1, 2]))
    reads: list[str] = []
    with _Reads(reads):
        cache.append(*new_tokens(3, 1))
        assert cache.length == 5 and cache.row_lengths() == [5, 2, 3]
    assert not reads


class _Reads(TorchDispatchMode):
    """Notes operators that bring a value from the device to the host."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_what_is_appended_is_a_copy_without_its_graph() -> None:
    cache = new_cache()
    k, v = (t.requires_grad_() for t in new_tokens(3, 2))
    cache.append(k, v)
    before = k.detach().clone()
    with torch.no_grad():
        k.zero_()
    assert not cache.view()[0].requires_grad
    assert torch.equal(cache.view()[0], before)


def test_a_full_cache_refuses_and_loses_nothing() -> None:
    cache = new_cache()
    k, v = new_tokens(3, 8)
    lengths = torch.tensor([8, 5, 0])
    cache.append(k, v, lengths)
    held = [(k[b, :, :n], v[b, :, :n]) for b, n in enumerate(lengths.tolist())]
    for more in (None, torch.tensor([2, 0, 0])):
        with pytest.raises(ValueError, match=r"cache full: it holds 8 tokens of max_length 9, and 2 more came"):
            cache.append(*new_tokens(3, 2), more)
        assert_holds(cache, held)
    cache.append(*new_tokens(3, 2), torch.tensor([1, 2, 2]))  # fits: only the first row is nearly full
    assert cache.row_lengths() == [9, 7, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.ones(2, HEADS, 1, K_SIZE)}, r"k has shape \[2, 2, 1, 3\]; this cache takes \[3, 2, S, 3\]"),
        ({"k": torch.ones(3, HEADS + 1, 1, K_SIZE)}, "k has shape"),
        ({"v": torch.ones(3, HEADS, 1, K_SIZE)}, "v has shape"),
        ({"v": torch.ones(3, HEADS, 2, V_SIZE)}, "v has shape"),
        ({"k": torch.ones(HEADS, 1, K_SIZE)}, "k has shape"),
        ({"v": torch.ones(3, HEADS, 1, V_SIZE).bfloat16()}, "v is torch.bfloat16"),
        ({"lengths": torch.tensor([1, 1])}, r"lengths is torch.int64 of shape \[2\]"),
        ({"lengths": torch.tensor([1.0, 1.0, 1.0])}, "lengths is torch.float32"),
        ({"lengths": torch.tensor([0, 1, 2])}, r"lengths is \[0, 1, 2\]; each must be from 0 to 1"),
        ({"lengths": torch.tensor([0, -1, 1])}, r"lengths is \[0, -1, 1\]"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_and_nothing_is_written(change: dict[str, Tensor], message: str) -> None:
    cache = new_cache()
    given_k, given_v = new_tokens(3, 1)
    with pytest.raises(ValueError, match=message):
        cache.append(**{"k": given_k, "v": given_v, **change})
    assert cache.length == 0
    assert not any(part.any() for storage in cache._storages() for part in storage.parts)


def test_bad_sizes_rows_and_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="max_length is 0"):
        ContiguousCache(1, 1, 0, 4)
    cache = new_cache()
    for call, message in (
        (lambda: cache.crop(-1), "length is -1"),
        (lambda: cache.repeat(0), "count is 0"),
        (lambda: cache.reorder(torch.tensor([0, 1])), r"indices has shape \[2\]"),
        (lambda: cache.reorder(torch.tensor([0, 1, 3])), r"indices is \[0, 1, 3\]; each must be from 0 to 2"),
        (lambda: cache.select(torch.tensor([-1])), r"indices is \[-1\]"),
        (lambda: cache.select(torch.tensor([True, False, True])), "indices is torch.bool"),
        (lambda: cache.select(torch.tensor([], dtype=torch.int64)), "indices is torch.int64 of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
