"""Pages: who holds them, when they are copied, and what happens when there are none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnzoo.caches import OutOfPages, PagedCache
from tests.caches.kinds import EMPTY, HEADS, KINDS, PAGES, Row, assert_holds, new_tokens, poison

pools = pytest.mark.parametrize("name", ["paged", "paged int8"])


def new_cache(name: str = "paged", batch_size: int = 3) -> PagedCache:
    cache = KINDS[name].new(batch_size)
    assert isinstance(cache, PagedCache)
    return cache


def bytes_of(cache: PagedCache) -> list[Tensor]:
    return [part.clone() for storage in cache._storages() for part in storage.parts]


@pools
def test_twins_share_pages_until_one_writes_and_only_the_last_page_is_copied(name: str) -> None:
    cache, (k, v), kind = new_cache(name), new_tokens(3, 40), KINDS[name]
    cache.append(k, v, torch.tensor([40, 0, 0]))
    assert cache.free_pages == PAGES - 3
    before = bytes_of(cache)
    cache.fork(0, [1, 2])
    assert cache.pages(0) == cache.pages(1) == cache.pages(2) and cache.free_pages == PAGES - 3
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(before, bytes_of(cache), strict=True))
    one_k, one_v = new_tokens(3, 1)
    cache.append(one_k, one_v)
    assert cache.free_pages == PAGES - 5  # the third writer keeps the page that the others have left
    assert {cache.pages(row)[:2] for row in range(3)} == {cache.pages(0)[:2]}
    assert len({cache.pages(row)[2] for row in range(3)}) == 3
    poison(cache)
    rows = [EMPTY.grown(k[0], v[0], kind).grown(one_k[b], one_v[b], kind) for b in range(3)]
    assert_holds(cache, rows, kind)
    cache.free([0])
    assert cache.free_pages == PAGES - 4  # the first two pages are the others' still
    cache.free([1, 2])
    assert cache.free_pages == PAGES


@pools
def test_a_row_that_writes_leaves_alone_what_a_twin_goes_on_holding(name: str) -> None:
    cache, (k, v), kind = new_cache(name), new_tokens(3, 10), KINDS[name]
    cache.append(k, v, torch.tensor([10, 0, 0]))
    cache.fork(0, [1])
    rows = [EMPTY.grown(k[0], v[0], kind), EMPTY.grown(k[0], v[0], kind), EMPTY]
    for row in (1, 0):  # the other one does not write
        more_k, more_v = new_tokens(3, 2)
        cache.append(more_k, more_v, torch.tensor([2 if b == row else 0 for b in range(3)]))
        rows[row] = rows[row].grown(more_k[row], more_v[row], kind)
        poison(cache)
        assert_holds(cache, rows, kind)
        assert cache.free_pages == PAGES - 2


def test_a_full_last_page_is_shared_without_a_copy() -> None:
    cache = new_cache()
    cache.append(*new_tokens(3, 32), torch.tensor([32, 0, 0]))
    cache.fork(0, [1])
    cache.append(*new_tokens(3, 1))
    assert cache.pages(0)[:2] == cache.pages(1)[:2] and cache.free_pages == PAGES - 5


@pools
def test_when_pages_run_out_nothing_is_lost_and_freed_rows_make_room(name: str) -> None:
    cache, (k, v), kind = new_cache(name), new_tokens(3, 62), KINDS[name]
    cache.append(k[:, :, :60], v[:, :, :60])  # 4 pages a row are all 12
    rows = [EMPTY.grown(k[b, :, :60], v[b, :, :60], kind) for b in range(3)]
    assert cache.free_pages == 0
    state = (cache.table.clone(), [list(held) for held in cache._pages], list(cache._pool.references), cache._ready)
    for lengths in (None, torch.tensor([5, 5, 5]), torch.tensor([0, 5, 0])):
        with pytest.raises(OutOfPages, match=r"out of pages: \d more are needed, and 0 of 12 are free"):
            cache.append(*new_tokens(3, 5), lengths)
        with pytest.raises(OutOfPages, match="out of pages: 3 more"):
            cache.reserve(5)
        assert torch.equal(cache.table, state[0]) and (cache._pages, cache._pool.references, cache._ready) == state[1:]
        assert_holds(cache, rows, kind)
    cache.append(k[:, :, 60:], v[:, :, 60:])  # still fits in the pages that the rows have
    rows = [row.grown(k[b, :, 60:], v[b, :, 60:], kind) for b, row in enumerate(rows)]
    cache.free([1])
    cache.append(*new_tokens(3, 5), torch.tensor([0, 5, 0]))
    poison(cache)
    assert cache.row_lengths() == [62, 5, 62] and cache.free_pages == 3
    cache.select(torch.tensor([2, 0]))
    assert_holds(cache, [rows[2], rows[0]], kind)


def test_a_failed_copy_on_write_leaves_the_twins_as_they_were() -> None:
    cache, (k, v), kind = new_cache(batch_size=2), new_tokens(2, 80), KINDS["paged"]
    cache.append(k, v, torch.tensor([72, 80]))  # 5 pages each, 2 are free
    cache.free([1])
    cache.fork(0, [1])
    filler = new_tokens(2, 1)
    cache.repeat(8)  # 16 rows on 5 pages; 15 of them would need a copy of the last, and 7 pages are free
    with pytest.raises(OutOfPages, match="15 more are needed, and 7 of 12 are free"):
        cache.append(*(t[:1].expand(16, -1, -1, -1) for t in filler))
    assert_holds(cache, [Row(k[0, :, :72], v[0, :, :72])] * 16, kind)
    assert cache.free_pages == 7


@pools
def test_a_prefix_is_adopted_by_its_pages(name: str) -> None:
    cache, (k, v), kind = new_cache(name), new_tokens(3, 40), KINDS[name]
    cache.append(k, v, torch.tensor([40, 0, 7]))
    prefix = cache.pages(0)[:2]
    cache.adopt(1, prefix, 32)
    cache.adopt(2, prefix, 32)
    cache.free([0])
    assert cache.free_pages == PAGES - 2
    one_k, one_v = new_tokens(3, 1)
    cache.append(one_k, one_v)
    poison(cache)
    shared = Row(k[0, :, :32], v[0, :, :32], since=32)
    rows = [EMPTY.grown(one_k[0], one_v[0], kind), *(shared.grown(one_k[b], one_v[b], kind) for b in (1, 2))]
    assert_holds(cache, rows if name == "paged int8" else [Row(row.k, row.v) for row in rows], kind)


def test_pages_and_rows_out_of_range_are_refused_and_nothing_changes() -> None:
    cache = new_cache()
    cache.append(*new_tokens(3, 20))
    held = cache.pages(0)
    unused = next(page for page in range(PAGES) if cache._pool.references[page] == 0)
    for call, message in (
        (lambda: cache.adopt(1, [PAGES], 16), r"pages is \[12\]; each must be from 0 to 11"),
        (lambda: cache.adopt(1, [-1], 16), r"pages is \[-1\]"),
        (lambda: cache.adopt(1, [unused], 16), rf"of these \[{unused}\] are free and hold nothing"),
        (lambda: cache.adopt(1, held, 33), "length is 33; 2 pages of 16 hold from 17 to 32 tokens"),
        (lambda: cache.adopt(1, held, 16), "length is 16"),
        (lambda: cache.adopt(3, held, 20), r"rows is \[3\]; each must be from 0 to 2"),
        (lambda: cache.fork(0, [1, 5]), r"rows is \[0, 1, 5\]"),
        (lambda: cache.free([-1]), r"rows is \[-1\]"),
        (lambda: cache.pages(7), r"rows is \[7\]"),
        (lambda: cache.reserve(-1), "count is -1"),
        (lambda: cache.reserve(61), "cache full: it holds 20 tokens of max_length 80, and 61 more came"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert cache.row_lengths() == [20, 20, 20] and cache.free_pages == PAGES - 6


def test_a_row_can_adopt_its_own_prefix() -> None:
    cache, (k, v) = new_cache(batch_size=1), new_tokens(1, 40)
    cache.append(k, v)
    cache.adopt(0, cache.pages(0)[:1], 16)
    assert_holds(cache, [Row(k[0, :, :16], v[0, :, :16])], KINDS["paged"])
    assert cache.free_pages == PAGES - 1


def test_reserved_pages_are_used_before_others_and_given_back_by_a_crop() -> None:
    cache = new_cache()
    cache.reserve(20)
    assert cache.free_pages == PAGES - 6 and cache.pages(0) == ()
    table = cache.table.clone()
    for _ in range(20):
        cache.append(*new_tokens(3, 1))
    assert torch.equal(cache.table, table) and len(cache.pages(0)) == 2
    cache.crop(3)
    assert cache.free_pages == PAGES - 3
    cache.reset()
    assert cache.free_pages == PAGES and cache.length == 0


def test_repeated_rows_share_everything_and_the_pool_need_not_grow() -> None:
    cache, (k, v) = new_cache(batch_size=1), new_tokens(1, 64)
    cache.append(k, v)
    pointer = cache._k.parts[0].data_ptr()
    cache.repeat(50)
    assert cache.batch_size == 50 and cache.free_pages == PAGES - 4 and cache._k.parts[0].data_ptr() == pointer
    assert torch.equal(cache.view()[0], k.expand(50, HEADS, 64, -1))
