"""Every cache against a list of rows, over any sequence of operations, with NaN in all memory that is not alive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnzoo.caches import OutOfPages, PagedCache, RollingCache
from attnzoo.caches.quantization import Int8Storage
from attnzoo.caches.token_cache import TokenCache
from attnzoo.ops import decode
from attnzoo.ops.decoding.reference import decode_reference
from tests.caches.kinds import (
    EMPTY,
    HEADS,
    K_SIZE,
    KINDS,
    MARGIN,
    PAGES,
    ROOM,
    WINDOW,
    Kind,
    Row,
    assert_holds,
    new_tokens,
    poison,
    stacked,
)

ACTIONS = ["append", "append", "append", "padded", "padded", "crop", "rows crop", "reorder", "select", "repeat"]
PAGED = ["fork", "free", "adopt", "reserve"]


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_sequence_of_operations_leaves_what_a_list_of_rows_would_hold(name: str, data: st.DataObject) -> None:
    kind = KINDS[name]
    cache, rows = kind.new(), [EMPTY] * 3
    actions = ACTIONS + (PAGED if isinstance(cache, PagedCache) else [])
    for _ in range(data.draw(st.integers(1, 9))):
        action = data.draw(st.sampled_from(actions))
        if action in ("append", "padded"):
            rows = append(cache, rows, kind, data, action == "padded")
        elif "crop" in action:
            rows = crop(cache, rows, kind, data, action == "rows crop")
        elif action in PAGED:
            assert isinstance(cache, PagedCache)
            rows = paged_action(cache, rows, action, data)
        else:
            rows = move(cache, rows, action, data)
        if isinstance(cache, PagedCache):
            assert_pages_add_up(cache)
        poison(cache)
        assert_holds(cache, rows, kind)
        most = MARGIN if cache.kept is None else cache.kept - WINDOW + 1  # after a crop fewer tokens are held
        assert_decodes(cache, rows, kind, data.draw(st.integers(1, most)))
    cache.reset()
    poison(cache)
    assert_holds(cache, [EMPTY] * len(rows), kind)


def append(cache: TokenCache, rows: list[Row], kind: Kind, data: st.DataObject, padded: bool) -> list[Row]:
    size, before = len(rows), [row.length for row in rows]
    count = data.draw(st.sampled_from([0, 1, 1, 2, 5, 16, 17, 23]))
    counts = [count] * size
    k, v = new_tokens(size, count)
    if padded:
        counts = data.draw(st.lists(st.integers(0, count), min_size=size, max_size=size))
        for row, real in enumerate(counts):
            k[row, :, real:], v[row, :, real:] = torch.nan, torch.nan
    lengths = torch.tensor(counts) if padded else None
    ends = [row + real for row, real in zip(before, counts, strict=True)]
    try:
        seen = cache.extend(k, v, lengths)
    except OutOfPages:
        assert isinstance(cache, PagedCache)
        most = sum(max(len(held), -(-end // 16)) for held, end in zip(cache._pages, ends, strict=True))
        assert most > PAGES, "the rows need no more pages than that, even if they share none"
        return rows
    except ValueError as error:
        assert "cache full" in str(error) and max(ends) > ROOM
        return rows
    assert max(ends) <= ROOM or isinstance(cache, RollingCache)
    rows = [
        row.grown(k[b, :, :real], v[b, :, :real], kind) for b, (row, real) in enumerate(zip(rows, counts, strict=True))
    ]
    if count:
        compare(seen, q_of(size, count), rows, kind, before)
    return rows


def crop(cache: TokenCache, rows: list[Row], kind: Kind, data: st.DataObject, by_row: bool) -> list[Row]:
    near = [row.length - data.draw(st.integers(0, MARGIN)) for row in rows]
    limits = [max(limit, 0) for limit in near] if by_row else [data.draw(st.sampled_from([0, 3, 20, *map(abs, near)]))]
    after = [row.cut(limit) for row, limit in zip(rows, limits if by_row else limits * len(rows), strict=True)]
    pairs = zip(rows, after, strict=True)
    if isinstance(cache, RollingCache) and any(
        0 < new.length < min(old.length, old.since + WINDOW) and old.since > 0 for old, new in pairs
    ):
        with pytest.raises(ValueError, match="has dropped its oldest"):
            cache.crop(torch.tensor(limits) if by_row else limits[0])
        return rows
    cache.crop(torch.tensor(limits) if by_row else limits[0])
    return after


def move(cache: TokenCache, rows: list[Row], action: str, data: st.DataObject) -> list[Row]:
    size = len(rows)
    if action == "repeat":
        count = data.draw(st.integers(1, 2)) if size < 4 else 1
        cache.repeat(count)
        return [row for row in rows for _ in range(count)]
    few = size if action == "reorder" else data.draw(st.integers(1, 4))
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=few, max_size=few))
    (cache.reorder if action == "reorder" else cache.select)(torch.tensor(indices))
    return [rows[index] for index in indices]


def paged_action(cache: PagedCache, rows: list[Row], action: str, data: st.DataObject) -> list[Row]:
    some = st.lists(st.integers(0, len(rows) - 1), max_size=len(rows))
    row, rows = data.draw(st.integers(0, len(rows) - 1)), list(rows)
    if action == "reserve":
        before = cache.free_pages
        try:
            cache.reserve(data.draw(st.sampled_from([1, 20])))
        except ValueError:
            assert cache.free_pages == before
    elif action == "fork":
        into = data.draw(some)
        cache.fork(row, into)
        rows = [rows[row] if b in into else old for b, old in enumerate(rows)]
    elif action == "free":
        gone = data.draw(some)
        cache.free(gone)
        rows = [EMPTY if b in gone else old for b, old in enumerate(rows)]
    else:
        other, held = data.draw(st.integers(0, len(rows) - 1)), cache.pages(row)
        count = data.draw(st.integers(0, len(held)))
        length = min(count * 16, rows[row].length)
        cache.adopt(other, held[:count], length)
        rows[other] = Row(rows[row].k[:, :length], rows[row].v[:, :length], length)
    return rows


def assert_pages_add_up(cache: PagedCache) -> None:
    """Every page is free or held, as often as it says; rows write to no page that others hold."""
    holds = [0] * PAGES
    for row, held in enumerate(cache._pages):
        assert cache.table[row, : len(held)].tolist() == held
        assert len(held) >= len(cache.pages(row)) and len(set(held)) == len(held)
        for page in held:
            holds[page] += 1
    assert holds == cache._pool.references
    assert cache.free_pages == holds.count(0)


def q_of(batch: int, count: int) -> Tensor:
    return torch.randn(batch, 2 * HEADS, count, K_SIZE, dtype=torch.float64)


def assert_decodes(cache: TokenCache, rows: list[Row], kind: Kind, queries: int) -> None:
    compare(cache, q_of(len(rows), queries), rows, kind, [row.length - queries for row in rows])


def compare(seen: Any, q: Tensor, rows: list[Row], kind: Kind, starts: list[int]) -> None:
    """`decode` is the textbook, over what was appended or, where that is rounded, over what the cache shows of it."""
    rounded = isinstance(seen, TokenCache) and isinstance(seen._storages()[0], Int8Storage)
    k, v = seen.view() if rounded else stacked(rows)
    lengths = [row.length for row in rows]
    expected = decode_reference(q, k, v, lengths, starts, mask=kind.mask, scale=0.4)
    at = starts[0] if len(set(starts)) == 1 else torch.tensor(starts)
    out = decode(q, seen, mask=kind.mask, scale=0.4, starts=at)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
