"""The decoding kernels against the fp64 textbook: every cache, with poison in all that no row may read.

On a machine without a GPU they run under Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo.caches import ContiguousCache, Int8Cache, PagedCache, PagedInt8Cache, RollingCache
from attnzoo.caches.token_cache import TokenCache
from attnzoo.masks import Causal, Dilated, Full, SlidingWindow
from attnzoo.ops import decode
from attnzoo.ops.decoding import Rows, Stored
from attnzoo.ops.decoding.reference import decode_reference
from attnzoo.ops.decoding.triton import op
from tests.caches.kinds import poison
from tests.support.compare import assert_as_accurate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # the interpreter gets bf16 wrong
LENGTHS = [67, 1, 0, 33]


def make(
    kind: str, batch: int, heads: int, dims: tuple[int, int], dtype: torch.dtype, page_size: int = 16
) -> TokenCache:
    sizes: dict[str, Any] = {"head_dim": dims[0], "v_head_dim": dims[1], "dtype": dtype, "device": DEVICE}
    pages: dict[str, Any] = {"num_pages": 160 // page_size * batch, "page_size": page_size, "max_length": 160}
    if kind == "rolling":
        return RollingCache(batch, heads, 20, margin=17, **sizes)
    if kind == "paged":
        return PagedCache(batch, heads, **pages, **sizes)
    if kind == "paged int8":
        return PagedInt8Cache(batch, heads, residual=7, **pages, **sizes)
    if kind == "asymmetric int8":
        return Int8Cache(batch, heads, 160, residual=0, symmetric=False, **sizes)
    return {"contiguous": ContiguousCache, "int8": Int8Cache}[kind](batch, heads, 160, **sizes)


def fill(cache: TokenCache, counts: list[int], q_len: int) -> TokenCache:
    """`counts` tokens a row, the last `q_len` of them from a step of their own; then poison."""
    poison(cache)
    for new in ([count - min(q_len, count) for count in counts], [min(q_len, count) for count in counts]):
        if any(new):
            tokens = [
                torch.randn(len(counts), cache.num_kv_heads, max(new), size, device=DEVICE).to(cache.dtype)
                for size in (cache.head_dim, cache.v_head_dim)
            ]
            cache.append(*tokens, torch.tensor(new))
    poison(cache)
    return cache


def check(q: Tensor, cache: TokenCache, *, mask: Any = None, starts: list[int] | None = None, **options: Any) -> None:
    """The kernel errs at most twice as much as plain PyTorch does."""
    counts = cache.row_lengths()
    starts = [count - q.shape[2] for count in counts] if starts is None else starts
    k, v = (part.nan_to_num() for part in cache.view())
    first = cache.first.tolist() if isinstance(cache.first, Tensor) else [cache.first] * len(counts)
    columns = [count - at for count, at in zip(counts, first, strict=True)]
    rows = [start - at for start, at in zip(starts, first, strict=True)]
    truths = []
    for dtype in (torch.float64, q.dtype):
        settings = {"mask": mask or Full(), "scale": q.shape[-1] ** -0.5, **options}
        if settings.get("sinks") is not None:
            settings["sinks"] = settings["sinks"].to(dtype)
        truths.append(decode_reference(q.to(dtype), k.to(dtype), v.to(dtype), columns, rows, **settings))
    given = torch.tensor(starts, device=q.device)
    got = decode(q, cache, mask=mask, starts=given, backend="triton", **options)
    assert_as_accurate("out", got, truths[1], truths[0])


KINDS = ["contiguous", "rolling", "paged", "int8", "asymmetric int8", "paged int8"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("group", "q_len"), [(1, 1), (3, 5), (8, 1)])
def test_every_cache_is_read_in_place(kind: str, group: int, q_len: int, dtype: torch.dtype) -> None:
    dim = 64 if "int8" in kind else 32  # from 64 on, and in half precision, codes are multiplied as they are
    cache = fill(make(kind, 4, 2, (dim, dim), dtype), LENGTHS, q_len)
    q = torch.randn(4, 2 * group, q_len, dim, device=DEVICE).to(dtype)
    check(q, cache, mask=SlidingWindow(13) if kind == "rolling" else Causal())


@pytest.mark.parametrize("kind", ["int8", "asymmetric int8"])
@pytest.mark.parametrize("size", [1e-4, 300.0])
def test_integer_products_keep_their_digits_at_any_size(kind: str, size: float) -> None:
    cache = make(kind, 2, 1, (64, 128), torch.float16)
    k, v = (torch.randn(2, 1, 150, n, device=DEVICE) for n in (64, 128))
    peaks = torch.rand(2, 1, 150, 1, device=DEVICE) ** 8  # some tokens are far smaller than others
    cache.append((k * 4).half(), (v * peaks * size).half())
    check(torch.randn(2, 5, 3, 64, device=DEVICE).half(), cache, mask=SlidingWindow(100), softcap=20.0)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("kind", ["contiguous", "paged int8", "rolling"])
def test_any_number_of_splits_gives_the_same(kind: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "splits_for", lambda *shape: splits)
    cache = fill(make(kind, 4, 1, (16, 16), torch.float32), [150, 3, 0, 40], 2)
    q = torch.randn(4, 3, 2, 16, device=DEVICE)
    sinks = torch.randn(3, device=DEVICE)
    check(q, cache, mask=SlidingWindow(20), softcap=2.0, sinks=sinks)


@pytest.mark.parametrize("q_len", [1, 2])
def test_one_key_head_whose_programs_share_the_merging(q_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter, which runs one program after another, all but the last give up waiting."""
    monkeypatch.setattr(op, "splits_for", lambda *shape: 5)
    cache = fill(make("contiguous", 2, 1, (16, 128), torch.float32), [150, 90], 2)
    for _ in range(2):  # the counters are right for the next call
        check(torch.randn(2, 30, q_len, 16, device=DEVICE), cache, sinks=torch.randn(30, device=DEVICE))


@pytest.mark.parametrize("mask", [None, Full(), Causal(), SlidingWindow(1), SlidingWindow(40), SlidingWindow(9, 2)])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
def test_masks_softcap_and_sinks(mask: Any, softcap: float | None, sinks: bool) -> None:
    cache = fill(make("contiguous", 4, 2, (16, 16), torch.float32), LENGTHS, 4)
    logits = torch.randn(4, device=DEVICE) if sinks else None
    check(torch.randn(4, 4, 4, 16, device=DEVICE), cache, mask=mask, softcap=softcap, sinks=logits, scale=0.6)


@pytest.mark.parametrize("page_size", [16, 32, 128])
@pytest.mark.parametrize("kind", ["paged", "paged int8"])
def test_pages_of_any_size_and_order(kind: str, page_size: int) -> None:
    cache = make(kind, 3, 2, (16, 16), torch.float32, page_size)
    fill(cache, [100, 17, 64], 1)
    cache.reorder(torch.tensor([2, 0, 0], device=DEVICE))  # rows share pages
    check(torch.randn(3, 4, 1, 16, device=DEVICE), cache, mask=Causal())


@pytest.mark.parametrize(("dim", "v_dim"), [(72, 72), (64, 24), (7, 128), (256, 256)])
def test_vectors_of_any_size(dim: int, v_dim: int) -> None:
    cache = fill(make("contiguous", 2, 1, (dim, v_dim), torch.float32), [35, 20], 1)
    check(torch.randn(2, 2, 1, dim, device=DEVICE), cache)


@pytest.mark.parametrize(("group", "q_len"), [(12, 16), (1, 16), (65, 1)])
def test_a_group_with_its_queries_may_fill_several_tiles(group: int, q_len: int) -> None:
    cache = fill(make("contiguous", 2, 1, (16, 16), torch.float32), [40, 18], q_len)
    check(torch.randn(2, group, q_len, 16, device=DEVICE), cache, mask=Causal())


def test_queries_past_a_rows_end_give_zero() -> None:
    cache = make("contiguous", 3, 1, (16, 16), torch.float32)
    fill(cache, [9, 4, 0], 3)
    q = torch.randn(3, 2, 3, 16, device=DEVICE)
    check(q, cache, mask=Causal(), starts=[7, 3, 0])
    out = decode(q, cache, mask=Causal(), starts=torch.tensor([7, 3, 0], device=DEVICE), backend="triton")
    assert not out[0, :, 2].any() and not out[1, :, 1:].any() and not out[2].any() and out[0, :, 1].any()


def test_rows_that_are_alike_need_no_tensor_of_lengths() -> None:
    cache = fill(make("int8", 2, 2, (16, 16), torch.float32), [70, 70], 3)
    assert cache.stored().lengths.more is None and cache.stored().recent is not None
    q = torch.randn(2, 4, 3, 16, device=DEVICE)
    out = decode(q, cache, mask=Causal(), backend="triton")
    torch.testing.assert_close(out, decode(q, cache, mask=Causal(), backend="attention"))
    torch.testing.assert_close(out, decode(q, cache, mask=Causal(), starts=67, backend="reference"))


def test_strided_queries_and_a_cache_that_is_only_a_view() -> None:
    rolling = make("rolling", 2, 2, (16, 16), torch.float32)
    fill(rolling, [30, 30], 4)
    tokens = [torch.randn(2, 2, 60, 16, device=DEVICE) for _ in range(2)]
    seen = rolling.extend(*tokens)  # longer than the ring
    assert seen is not rolling
    q = torch.randn(2, 4, 16, 4, device=DEVICE).transpose(2, 3)[:, :, :4]  # its last stride is not 1
    mask = SlidingWindow(15)
    got = decode(q, seen, mask=mask, starts=86, backend="triton")
    torch.testing.assert_close(got, decode(q, seen, mask=mask, starts=86, backend="attention"))


class Growing:
    """A cache whose lengths are known to the device alone, as a captured graph has them."""

    def __init__(self, k: Tensor, v: Tensor, lengths: Tensor) -> None:
        self.k, self.v, self.lengths = k, v, lengths
        self.length, self.uniform, self.first, self.kept = k.shape[2], False, 0, None

    def stored(self) -> Stored:
        return Stored((self.k,), (self.v,), self.k.dtype, Rows(0, self.lengths), self.length)


def test_lengths_are_read_where_the_kernel_runs() -> None:
    k, v = (torch.randn(2, 1, 90, 16, device=DEVICE) for _ in range(2))
    lengths = torch.tensor([5, 2], device=DEVICE)
    cache, q = Growing(k, v, lengths), torch.randn(2, 3, 1, 16, device=DEVICE)
    for counts in ([5, 2], [90, 61]):
        lengths.copy_(torch.tensor(counts))
        truth = decode_reference(q, k, v, counts, [count - 1 for count in counts], mask=Full(), scale=0.25)
        torch.testing.assert_close(decode(q, cache, backend="triton"), truth)


def arguments(kind: str = "paged int8") -> tuple[Any, ...]:
    cache = fill(make(kind, 2, 1, (16, 16), torch.float32), [40, 21], 1)
    held, q = cache.stored(), torch.randn(2, 2, 1, 16, device=DEVICE)
    recent = [] if held.recent is None else [held.recent.k[0], held.recent.v[0]]
    kept = Rows(0) if held.kept is None else held.kept
    starts = held.lengths.more
    shared = [held.lengths.base, held.lengths.base - 1, kept.base]
    tables = (held.table, held.lengths.more, starts, kept.more, None)
    return (q, list(held.k), list(held.v), recent, *tables, shared, held.longest, 2**30, 0, 0, False, 0.25, None)


@pytest.mark.parametrize("kind", ["contiguous", "paged int8"])
def test_the_operator_passes_opcheck(kind: str) -> None:
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op.decode_op, arguments(kind), test_utils=tests)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_it_compiles_without_a_graph_break(kind: str) -> None:
    cache = fill(make(kind, 2, 1, (16, 16), torch.float32), [40, 21], 1)
    q = torch.randn(2, 2, 1, 16, device=DEVICE)

    def step(q: Tensor) -> Tensor:
        return decode(q, cache, mask=Causal(), backend="triton") * 2

    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(q), step(q))


@pytest.mark.parametrize(
    ("q", "mask", "reason"),
    [
        (torch.ones(2, 2, 17, 16), None, "takes up to 16 queries, not 17"),
        (torch.ones(2, 2, 1, 16), Dilated(4, 2), "has no 'dilated' mask"),
        (torch.ones(2, 2, 1, 16).half(), None, "wants queries of the cache's torch.float32, not torch.float16"),
        (torch.ones(2, 2, 1, 16).requires_grad_(), None, "has no backward"),
    ],
)
def test_what_it_cannot_run_is_said(q: Tensor, mask: Any, reason: str) -> None:
    cache = fill(make("contiguous", 2, 1, (16, 16), torch.float32), [40, 40], 1)
    with pytest.raises(ValueError, match=f"no backend can run this call\ntriton: .*{reason}"):
        decode(q.to(DEVICE), cache, mask=mask, backend="triton")


def test_an_unknown_backend_is_named() -> None:
    cache = fill(make("contiguous", 2, 1, (16, 16), torch.float32), [40, 40], 1)
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of \['triton', 'attention', 'reference'\]"):
        decode(torch.ones(2, 2, 1, 16, device=DEVICE), cache, backend="flash")
