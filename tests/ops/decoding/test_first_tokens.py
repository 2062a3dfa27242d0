"""Decoding in a sliding window plus the first tokens: each key counted once, and none read that lies between.

On a machine without a GPU the kernels run under Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo.caches import RollingCache
from attnzoo.caches.token_cache import TokenCache
from attnzoo.masks import Causal, GlobalTokens, Mask, SlidingWindow
from attnzoo.ops import decode
from attnzoo.ops.decoding import explain_decode
from attnzoo.ops.decoding.store import places
from attnzoo.ops.decoding.triton import op
from tests.ops.decoding.test_triton import DEVICE, DTYPES, LENGTHS, arguments, check, fill, make


def both(first: int, window: int) -> Mask:
    return SlidingWindow(window) | (GlobalTokens(first) & Causal())


def ring(counts: list[int], q_len: int, first: int, window: int, margin: int, dtype: torch.dtype) -> TokenCache:
    sizes: dict[str, Any] = {"head_dim": 16, "dtype": dtype, "device": DEVICE}
    return fill(RollingCache(len(counts), 2, window, margin=margin, prefix=first, **sizes), counts, q_len)


def poison_between(cache: TokenCache, first: int, window: int, starts: list[int]) -> TokenCache:
    """NaN in every key and value that neither the first tokens nor the window of a query holds."""
    held = cache.stored()
    for row, start in enumerate(starts):
        between = torch.arange(first, max(start - window + 1, first), device=DEVICE)
        blocks, slots = places(held, between.expand(held.batch, -1))
        for part in (*held.k, *held.v):
            part[blocks[row] if blocks.dim() == 2 else row, :, slots[row]] = NAN[part.dtype]
        if held.recent is not None and held.kept is not None:
            near = between[between >= cache.row_lengths()[row] - held.recent.size]
            for part in (*held.recent.k, *held.recent.v):
                part[row, :, near % held.recent.size] = torch.nan
    return cache


NAN = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.nan) | {torch.int8: 127}  # with a NaN scale


def checked(
    kind: str, counts: list[int], first: int, window: int, q_len: int, dtype: torch.dtype = torch.float32,
    group: int = 2, dim: int = 16, page_size: int = 16, **options: Any,
) -> None:  # fmt: skip
    cache = fill(make(kind, len(counts), 2, (dim, dim), dtype, page_size), counts, q_len)
    poison_between(cache, first, window, [count - q_len for count in counts])
    q = torch.randn(len(counts), 2 * group, q_len, dim, device=DEVICE).to(dtype)
    check(q, cache, mask=both(first, window), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "paged", "int8", "asymmetric int8", "paged int8"])
@pytest.mark.parametrize(("group", "q_len"), [(1, 1), (3, 5), (8, 1)])
def test_every_cache_is_read_in_place(kind: str, group: int, q_len: int, dtype: torch.dtype) -> None:
    dim = 64 if "int8" in kind else 32  # from 64 on, and in half precision, codes are multiplied as they are
    checked(kind, LENGTHS, 4, 12, q_len, dtype, group, dim)


@pytest.mark.parametrize("kind", ["contiguous", "paged int8"])
@pytest.mark.parametrize(
    ("first", "window"),
    [
        (0, 9),  # no first tokens
        (4, 252),  # rows shorter than the window
        (150, 3),  # rows shorter than the first tokens, or as long
        (30, 35),  # a row that the window reaches into the first tokens of, and one past them
        (33, 1),  # the window is the query's own key
        (32, 32),  # a tile of each
        (64, 37),  # several tiles of first tokens
    ],
)
@pytest.mark.parametrize("q_len", [1, 4])
def test_first_tokens_and_window_of_any_sizes(kind: str, first: int, window: int, q_len: int) -> None:
    checked(kind, [150, 67, 1, 0, 34], first, window, q_len)


@pytest.mark.parametrize("first", [5, 12])
def test_queries_of_one_step_may_straddle_the_end_of_the_first_tokens(first: int) -> None:
    for count in range(first, first + 22, 3):  # the window of some holds first tokens, of others not
        checked("contiguous", [count, count + 1], first, 4, 16, group=1)


@pytest.mark.parametrize("splits", [2, 3, 5])
@pytest.mark.parametrize("kind", ["contiguous", "paged", "paged int8"])
def test_any_number_of_splits_gives_the_same(kind: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "splits_for", lambda *shape: splits)
    sinks = torch.randn(4, device=DEVICE)
    checked(kind, [150, 3, 0, 90], 40, 50, 2, softcap=2.0, sinks=sinks)
    checked(kind, [150, 3, 0, 90], 4, 20, 1, softcap=2.0, sinks=sinks)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
def test_softcap_and_sinks(softcap: float | None, sinks: bool) -> None:
    logits = torch.randn(4, device=DEVICE) if sinks else None
    checked("contiguous", LENGTHS, 4, 20, 4, softcap=softcap, sinks=logits, scale=0.6)


@pytest.mark.parametrize("page_size", [16, 32, 128])
def test_pages_of_any_size(page_size: int) -> None:
    checked("paged", [100, 17, 120], 5, 40, 1, page_size=page_size)


@pytest.mark.parametrize("residual", [7, 64])
def test_first_tokens_may_still_be_among_the_newest_of_an_int8_cache(residual: int) -> None:
    kind = {7: "paged int8", 64: "int8"}[residual]
    for counts in ([9, 20], [12, 13], [66, 70], [90, 8]):
        checked(kind, counts, 10, 3, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("first", "window", "margin"), [(4, 12, 4), (4, 1, 4), (33, 20, 3), (1, 40, 9), (20, 150, 3)])
@pytest.mark.parametrize("q_len", [1, 4])
def test_a_ring_with_first_tokens_beside_it(
    first: int, window: int, margin: int, q_len: int, dtype: torch.dtype
) -> None:
    for counts in ([150, 3, 0, 61], [first + window + margin, first + window + margin + 1]):
        cache = ring(counts, q_len, first, window, margin, dtype)
        q = torch.randn(len(counts), 6, q_len, 16, device=DEVICE).to(dtype)
        for shown in (first, first // 2):  # a mask may show fewer than are held
            check(q, cache, mask=both(shown, window), softcap=2.0)
        check(q, cache, mask=SlidingWindow(window))


def test_first_tokens_alone_and_windows_that_look_ahead() -> None:
    cache = fill(make("contiguous", 4, 2, (16, 16), torch.float32), LENGTHS, 4)
    for mask in (GlobalTokens(3) & Causal(), SlidingWindow(4, 2) | (GlobalTokens(3) & Causal())):
        check(torch.randn(4, 4, 4, 16, device=DEVICE), cache, mask=mask)


def test_queries_past_a_rows_end_give_zero() -> None:
    cache = fill(make("contiguous", 3, 1, (16, 16), torch.float32), [30, 4, 0], 3)
    q = torch.randn(3, 2, 3, 16, device=DEVICE)
    for mask in (both(2, 5), GlobalTokens(6) & Causal()):
        check(q, cache, mask=mask, starts=[28, 4, 0])
        out = decode(q, cache, mask=mask, starts=torch.tensor([28, 4, 0], device=DEVICE), backend="triton")
        assert not out[0, :, 2].any() and not out[1:].any() and out[0, :, 1].any()


def test_the_operator_passes_opcheck() -> None:
    given = list(arguments("paged int8"))
    given[11], given[13] = 12, 4  # a window of 12 and 4 first tokens
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op.decode_op, tuple(given), test_utils=tests)


def test_it_compiles_without_a_graph_break() -> None:
    cache = fill(make("contiguous", 2, 1, (16, 16), torch.float32), [40, 21], 1)
    q, mask = torch.randn(2, 2, 1, 16, device=DEVICE), both(4, 12)

    def step(q: Tensor) -> Tensor:
        return decode(q, cache, mask=mask, backend="triton") * 2

    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(q), step(q))


class Dropped:
    """A view that begins at position 5 and does not say how much it has kept."""

    length, uniform, first, kept = 20, True, 5, None

    def __init__(self) -> None:
        self.k, self.v = (torch.randn(1, 1, 15, 16, device=DEVICE) for _ in range(2))

    def view(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v


def test_first_tokens_that_were_dropped_are_refused() -> None:
    q, cache = torch.randn(1, 2, 1, 16, device=DEVICE), Dropped()
    with pytest.raises(ValueError, match=r"triton: .*finds first tokens only where nothing was dropped"):
        decode(q, cache, mask=both(4, 12), backend="triton")
    assert "where nothing was dropped" in explain_decode(q, cache, mask=both(4, 12))
    rolling = fill(make("rolling", 1, 1, (16, 16), torch.float32), [60], 1)
    with pytest.raises(ValueError, match="lets a query see any key before it"):
        decode(q, rolling, mask=both(4, 12), backend="triton")
    early = fill(make("rolling", 1, 1, (16, 16), torch.float32), [30], 1)  # nothing is dropped yet, and soon will be
    with pytest.raises(ValueError, match=r"triton: .*finds first tokens only where nothing was dropped"):
        decode(q, early, mask=both(4, 12), backend="triton")
    assert decode(q, early, mask=both(4, 12)).isfinite().all()
