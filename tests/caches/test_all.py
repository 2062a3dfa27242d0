"""What every cache promises: it copies, it never waits for the device, it counts its bytes, and it refuses by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnzoo.caches import Int8Cache, PagedCache, RollingCache
from attnzoo.caches.ring import Ring
from attnzoo.caches.token_cache import TokenCache
from tests.caches.kinds import EMPTY, HEADS, K_SIZE, KINDS, PAGES, ROOM, V_SIZE, assert_holds, new_tokens, poison

every_cache = pytest.mark.parametrize("name", KINDS)


class Waits(TorchDispatchMode):
    """Notes operators that bring a value from the device to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@every_cache
def test_rows_of_one_length_never_wait_for_the_device(name: str) -> None:
    cache = KINDS[name].new(device="meta")  # a device whose values cannot be read at all
    cache.append(*new_tokens(3, 14, device="meta"))
    for _ in range(4):  # into a new page
        cache.append(*new_tokens(3, 1, device="meta"))
    assert cache.view()[0].shape == (3, HEADS, 11 if name == "rolling" else 18, K_SIZE)
    if not isinstance(cache, PagedCache):  # its rows move on the host
        cache.reorder(torch.zeros(3, dtype=torch.int64, device="meta"))
    cache.crop(16)
    assert (cache.length, cache.uniform, cache.row_lengths()) == (16, True, [16] * 3)
    assert cache.lengths.shape == (3,)


@every_cache
def test_steps_after_padded_prompts_never_wait_for_the_device(name: str) -> None:
    cache = KINDS[name].new()
    cache.append(*new_tokens(3, 15), torch.tensor([15, 1, 12]))
    with Waits() as waits:
        for _ in range(3):
            cache.append(*new_tokens(3, 1))
        cache.view()
        assert cache.length == 18 and cache.row_lengths() == [18, 4, 15]
    assert not waits.seen


@every_cache
def test_what_is_appended_is_a_copy_without_its_graph(name: str) -> None:
    cache = KINDS[name].new()
    k, v = (t.requires_grad_() for t in new_tokens(3, 9))
    cache.append(k, v)
    before = [t.clone() for t in cache.view()]
    with torch.no_grad():
        k.zero_(), v.zero_()
    assert not cache.view()[0].requires_grad and before[0].any()
    assert all(map(torch.equal, cache.view(), before))


def tensors_of(thing: Any) -> list[Tensor]:
    """All tensors that are held, by way of every attribute."""
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, list | tuple):
        return [tensor for part in thing for tensor in tensors_of(part)]
    return tensors_of(list(vars(thing).values())) if hasattr(thing, "__dict__") and not callable(thing) else []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@every_cache
def test_bytes_are_those_that_are_really_held(name: str, dtype: torch.dtype) -> None:
    cache = KINDS[name].make(
        batch_size=3, num_kv_heads=HEADS, head_dim=K_SIZE, v_head_dim=V_SIZE, dtype=dtype, device="cpu"
    )
    held = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors_of(cache)}
    assert cache.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    numbers, overhead = HEADS * (K_SIZE + V_SIZE), 4 * 2 * HEADS * (2 if name == "asymmetric int8" else 1)
    assert cache.bytes_per_token == (numbers + overhead if "int8" in name else numbers * dtype.itemsize)
    slots = {"rolling": 3 * 11, "paged": PAGES * 16, "paged int8": PAGES * 16}.get(name, 3 * ROOM)
    beside = cache.nbytes - slots * cache.bytes_per_token
    assert beside == ("paged" in name) * 3 * 5 * 4 + (name in ("int8", "paged int8")) * 3 * 9 * numbers * dtype.itemsize


@every_cache
def test_a_full_cache_refuses_and_loses_nothing(name: str) -> None:
    kind, lengths = KINDS[name], torch.tensor([79, 5, 0])
    if name == "rolling":
        return  # is never full
    cache, (k, v) = kind.new(), new_tokens(3, 79)
    cache.append(k, v, lengths)
    rows = [EMPTY.grown(k[b, :, :n], v[b, :, :n], kind) for b, n in enumerate(lengths.tolist())]
    for more in (None, torch.tensor([2, 0, 0])):
        with pytest.raises(ValueError, match=r"cache full: it holds 79 tokens of max_length 80, and 2 more came"):
            cache.append(*new_tokens(3, 2), more)
        poison(cache)
        assert_holds(cache, rows, kind)
    cache.append(*new_tokens(3, 2), torch.tensor([1, 2, 2]))  # fits: only the first row is nearly full
    assert cache.row_lengths() == [80, 7, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.ones(2, HEADS, 1, 4)}, r"k has shape \[2, 2, 1, 4\]; this cache takes \[3, 2, S, 4\]"),
        ({"k": torch.ones(3, HEADS + 1, 1, 4)}, "k has shape"),
        ({"v": torch.ones(3, HEADS, 1, 4)}, "v has shape"),
        ({"v": torch.ones(3, HEADS, 2, 3)}, "v has shape"),
        ({"k": torch.ones(HEADS, 1, 4)}, "k has shape"),
        (
            {"v": torch.ones(3, HEADS, 1, 3).bfloat16()},
            "v is torch.bfloat16 on cpu; this cache is torch.float64 on cpu",
        ),
        ({"v": torch.ones(3, HEADS, 1, 3, dtype=torch.float64, device="meta")}, "v is torch.float64 on meta"),
        ({"lengths": torch.tensor([1, 1])}, r"lengths is torch.int64 of shape \[2\]"),
        ({"lengths": torch.tensor([1.0, 1.0, 1.0])}, "lengths is torch.float32"),
        ({"lengths": torch.tensor([0, 1, 2])}, r"lengths is \[0, 1, 2\]; each must be from 0 to 1"),
        ({"lengths": torch.tensor([0, -1, 1])}, r"lengths is \[0, -1, 1\]"),
    ],
)
@every_cache
def test_tokens_that_do_not_fit_are_refused_and_nothing_is_written(
    name: str, change: dict[str, Tensor], message: str
) -> None:
    cache = KINDS[name].make(batch_size=3, num_kv_heads=HEADS, head_dim=4, v_head_dim=3, dtype=torch.float64)
    k, v = new_tokens(3, 1)
    for method in (cache.append, cache.extend):
        with pytest.raises(ValueError, match=message):
            method(**{"k": k, "v": v, **change})
    assert cache.length == 0
    assert not any(part.any() for storage in cache._storages() for part in storage.parts)


@every_cache
def test_bad_rows_counts_and_lengths_are_refused(name: str) -> None:
    cache = KINDS[name].new()
    cache.append(*new_tokens(3, 2))
    for call, message in (
        (lambda: cache.crop(-1), "length is -1"),
        (lambda: cache.crop(torch.tensor([1, 2])), r"length is torch.int64 of shape \[2\]"),
        (lambda: cache.crop(torch.tensor([1, -2, 3])), r"length is \[1, -2, 3\]"),
        (lambda: cache.repeat(0), "count is 0"),
        (lambda: cache.reorder(torch.tensor([0, 1])), r"indices has shape \[2\]"),
        (lambda: cache.reorder(torch.tensor([0, 1, 3])), r"indices is \[0, 1, 3\]; each must be from 0 to 2"),
        (lambda: cache.select(torch.tensor([-1])), r"indices is \[-1\]"),
        (lambda: cache.select(torch.tensor([True, False, True])), "indices is torch.bool"),
        (lambda: cache.select(torch.tensor([], dtype=torch.int64)), "indices is torch.int64 of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert cache.row_lengths() == [2, 2, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KINDS["contiguous"].make(batch_size=1, num_kv_heads=1, head_dim=4, max_length=0), "max_length is 0"),
        (lambda: RollingCache(1, 1, 0, 4), "window is 0; it must be at least 1"),
        (lambda: RollingCache(1, 1, 4, 4, margin=-1), "margin is -1"),
        (lambda: PagedCache(1, 1, 0, 4), "num_pages is 0"),
        (lambda: PagedCache(1, 1, 2, 4, page_size=8), "page_size is 8; it must be a power of two and at least 16"),
        (lambda: PagedCache(1, 1, 2, 4, page_size=48), "page_size is 48"),
        (lambda: PagedCache(0, 1, 2, 4), "batch_size is 0"),
        (lambda: Int8Cache(1, 1, 2, 4, residual=-1), "residual is -1"),
        (lambda: Int8Cache(1, 1, 2, 4, 0), "v_head_dim is 0"),
    ],
)
def test_caches_that_cannot_be_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_names_of_the_room_are_found_lazily() -> None:
    import attnzoo.caches as room

    assert all(getattr(room, name).__name__ == name for name in room.__all__)
    with pytest.raises(AttributeError, match="no attribute 'FifoCache'"):
        _ = room.FifoCache  # type: ignore[attr-defined]
    assert issubclass(room.PagedInt8Cache, TokenCache) and not issubclass(Ring, TokenCache)
