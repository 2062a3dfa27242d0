"""The latent cache against a list of rows, its bytes, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnzoo.caches import LatentCache

RANK, ROPE, ROOM = 5, 2, 9


def new_cache(batch_size: int = 3, device: str = "cpu") -> LatentCache:
    return LatentCache(batch_size, ROOM, RANK, ROPE, dtype=torch.float32, device=device)


def new_tokens(batch_size: int, count: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    return (
        torch.randn(batch_size, 1, count, RANK, device=device),
        torch.randn(batch_size, 1, count, ROPE, device=device),
    )


def assert_holds(cache: LatentCache, rows: list[tuple[Tensor, Tensor]]) -> None:
    lengths = [latent.shape[0] for latent, _ in rows]
    assert cache.row_lengths() == lengths == cache.lengths.tolist()
    assert cache.length == max(lengths)
    assert cache.uniform == (len(set(lengths)) == 1)
    assert (cache.batch_size, cache.num_kv_heads, cache.head_dim, cache.v_head_dim) == (len(rows), 1, RANK, ROPE)
    parts = cache.view()
    assert [part.shape for part in parts] == [(len(rows), 1, max(lengths), size) for size in (RANK, ROPE)]
    for row, held in enumerate(rows):
        for part, expected in zip(parts, held, strict=True):
            assert torch.equal(part[row, 0, : lengths[row]], expected)
        assert torch.equal(cache.joint()[row, 0, : lengths[row]], torch.cat(held, -1))
    assert parts[0].untyped_storage().data_ptr() == parts[1].untyped_storage().data_ptr()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_sequence_of_operations_leaves_what_a_list_of_rows_would_hold(data: st.DataObject) -> None:
    cache = new_cache()
    empty = torch.empty(0, RANK), torch.empty(0, ROPE)
    rows = [empty] * 3
    for _ in range(data.draw(st.integers(1, 7))):
        size = len(rows)
        action = data.draw(st.sampled_from(["append", "padded", "padded", "crop", "reorder", "select", "repeat"]))
        if action in ("append", "padded"):
            count = data.draw(st.integers(0, 5))
            latent, rope_key = new_tokens(size, count)
            counts = [count] * size
            if action == "padded":
                counts = data.draw(st.lists(st.integers(0, count), min_size=size, max_size=size))
            lengths = torch.tensor(counts) if action == "padded" else None
            if any(row[0].shape[0] + real > ROOM for row, real in zip(rows, counts, strict=True)):
                with pytest.raises(ValueError, match="cache full"):
                    cache.append(latent, rope_key, lengths)
            else:
                cache.append(latent, rope_key, lengths)
                rows = [
                    (torch.cat([row[0], latent[b, 0, :real]]), torch.cat([row[1], rope_key[b, 0, :real]]))
                    for b, (row, real) in enumerate(zip(rows, counts, strict=True))
                ]
        elif action == "crop":
            length = data.draw(st.integers(0, ROOM))
            cache.crop(length)
            rows = [(latent[:length], rope_key[:length]) for latent, rope_key in rows]
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_takes_one_latent_and_one_rope_key_a_token_and_no_byte_more(dtype: torch.dtype) -> None:
    cache = LatentCache(4, 100, 512, 64, dtype=dtype)
    assert cache.nbytes == (512 + 64) * dtype.itemsize * 4 * 100
    assert cache.bytes_per_token == (512 + 64) * dtype.itemsize
    held: dict[int, int] = {}
    seen: set[int] = set()

    def walk(thing: object) -> None:
        if id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            held[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        for part in (
            thing if isinstance(thing, list | tuple) else vars(thing).values() if hasattr(thing, "__dict__") else ()
        ):
            walk(part)

    walk(cache)
    assert sum(held.values()) == cache.nbytes
    cache.select(torch.tensor([0, 2]))
    assert cache.nbytes == (512 + 64) * dtype.itemsize * 2 * 100
    cache.repeat(3)
    assert cache.nbytes == (512 + 64) * dtype.itemsize * 6 * 100


def test_rows_of_one_length_never_wait_for_the_device() -> None:
    cache = new_cache(device="meta")  # a device whose values cannot be read at all
    cache.append(*new_tokens(3, 4, "meta"))
    cache.reorder(torch.zeros(3, dtype=torch.int64, device="meta"))
    cache.crop(3)
    assert (cache.length, cache.uniform, cache.row_lengths()) == (3, True, [3, 3, 3])
    assert (cache.dtype, cache.device) == (torch.float32, torch.device("meta"))


def test_what_is_appended_is_a_copy_without_its_graph() -> None:
    cache = new_cache()
    latent, rope_key = (t.requires_grad_() for t in new_tokens(3, 2))
    cache.append(latent, rope_key)
    before = latent.detach().clone()
    with torch.no_grad():
        latent.zero_()
    assert not cache.view()[0].requires_grad
    assert torch.equal(cache.view()[0], before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.ones(2, 1, 1, RANK)}, r"k has shape \[2, 1, 1, 5\]; this cache takes \[3, 1, S, 5\]"),
        ({"k": torch.ones(3, 1, 1, RANK + 1)}, "k has shape"),
        ({"k": torch.ones(3, 1, RANK)}, "k has shape"),
        ({"v": torch.ones(3, 2, 1, ROPE)}, "v has shape"),
        ({"v": torch.ones(3, 1, 2, ROPE)}, "v has shape"),
        ({"v": torch.ones(3, 1, 1, ROPE).bfloat16()}, "v is torch.bfloat16"),
        ({"lengths": torch.tensor([0, 1, 2])}, r"lengths is \[0, 1, 2\]; each must be from 0 to 1"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_and_nothing_is_written(change: dict[str, Tensor], message: str) -> None:
    cache = new_cache()
    latent, rope_key = new_tokens(3, 1)
    with pytest.raises(ValueError, match=message):
        cache.append(**{"k": latent, "v": rope_key, **change})
    assert cache.length == 0


def test_bad_sizes_rows_and_counts_are_refused() -> None:
    for arguments, message in (
        ((1, 0, 4, 2), "max_length is 0"),
        ((1, 8, 0, 2), "kv_lora_rank is 0"),
        ((1, 8, 4, 0), "qk_rope_head_dim is 0"),
        ((0, 8, 4, 2), "batch_size is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            LatentCache(*arguments)
    cache = new_cache()
    for call, message in (
        (lambda: cache.crop(-1), "length is -1"),
        (lambda: cache.repeat(0), "count is 0"),
        (lambda: cache.reorder(torch.tensor([0, 1])), r"indices has shape \[2\]"),
        (lambda: cache.select(torch.tensor([3])), r"indices is \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
