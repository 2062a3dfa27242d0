"""The latent kernel against the fp64 formula: every cache of latents, with poison in all that no row may read.

On a machine without a GPU it runs under Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo.caches import ContiguousCache, Int8Cache, LatentCache, PagedCache, PagedInt8Cache, RollingCache
from attnzoo.caches.token_cache import TokenCache
from attnzoo.masks import Causal, Dilated, Full, SlidingWindow
from attnzoo.ops import latent_decode
from attnzoo.ops.decoding import Rows
from attnzoo.ops.latent.reference import latent_decode_reference
from attnzoo.ops.latent.triton import op
from tests.caches.kinds import poison
from tests.support.compare import assert_as_accurate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # the interpreter gets bf16 wrong
LENGTHS = [67, 1, 0, 33]
SCALE = 0.2


def make(kind: str, batch: int, dtype: torch.dtype, rank: int = 32, rope: int = 16, page_size: int = 16) -> TokenCache:
    options: dict[str, Any] = {"dtype": dtype, "device": DEVICE}
    if kind == "latent":
        return LatentCache(batch, 160, rank, rope, **options)
    options |= {"batch_size": batch, "num_kv_heads": 1, "head_dim": rank, "v_head_dim": rope}
    pages = {"num_pages": 160 // page_size * batch, "page_size": page_size, "max_length": 160}
    if kind == "rolling":
        return RollingCache(window=20, margin=17, **options)
    if kind == "paged":
        return PagedCache(**pages, **options)
    if kind == "paged int8":
        return PagedInt8Cache(residual=7, **pages, **options)
    if kind == "asymmetric int8":
        return Int8Cache(max_length=160, residual=0, symmetric=False, **options)
    return {"contiguous": ContiguousCache, "int8": Int8Cache}[kind](max_length=160, **options)


def fill(cache: TokenCache, counts: list[int], q_len: int) -> TokenCache:
    """`counts` tokens a row, the last `q_len` of them from a step of their own; then poison."""
    poison(cache)
    for new in ([count - min(q_len, count) for count in counts], [min(q_len, count) for count in counts]):
        if any(new):
            sizes = cache.head_dim, cache.v_head_dim
            tokens = [torch.randn(len(counts), 1, max(new), n, device=DEVICE).to(cache.dtype) for n in sizes]
            cache.append(*tokens, torch.tensor(new))
    poison(cache)
    return cache


def queries(batch: int, heads: int, q_len: int, cache: TokenCache) -> list[Tensor]:
    sizes = cache.head_dim, cache.v_head_dim
    return [torch.randn(batch, heads, q_len, n, device=DEVICE).to(cache.dtype) for n in sizes]


def check(q: list[Tensor], cache: TokenCache, mask: Any = None, starts: list[int] | None = None) -> None:
    """The kernel errs at most twice as much as plain PyTorch does."""
    counts = cache.row_lengths()
    starts = [count - q[0].shape[2] for count in counts] if starts is None else starts
    views = [part.nan_to_num() for part in cache.view()]
    first = cache.first.tolist() if isinstance(cache.first, Tensor) else [cache.first] * len(counts)
    columns = [count - at for count, at in zip(counts, first, strict=True)]
    rows = [start - at for start, at in zip(starts, first, strict=True)]
    truths = [
        latent_decode_reference(
            *(part.to(dtype) for part in (*q, *views)), columns, rows, scale=SCALE, mask=mask or Full()
        )
        for dtype in (torch.float64, q[0].dtype)
    ]
    given = torch.tensor(starts, device=DEVICE)
    got = latent_decode(*q, cache, scale=SCALE, mask=mask, starts=given, backend="triton")
    assert_as_accurate("out", got, truths[1], truths[0])


KINDS = ["latent", "contiguous", "rolling", "paged", "int8", "asymmetric int8", "paged int8"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "q_len"), [(1, 1), (3, 5), (16, 1)])
def test_every_cache_of_latents_is_read_in_place(kind: str, heads: int, q_len: int, dtype: torch.dtype) -> None:
    cache = fill(make(kind, 4, dtype), LENGTHS, q_len)
    check(queries(4, heads, q_len, cache), cache, SlidingWindow(13) if kind == "rolling" else Causal())


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("kind", ["latent", "paged int8"])
def test_any_number_of_splits_gives_the_same(kind: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "splits_for", lambda *shape: splits)
    cache = fill(make(kind, 4, torch.float32), [150, 3, 0, 40], 2)
    check(queries(4, 3, 2, cache), cache, SlidingWindow(20))


@pytest.mark.parametrize("mask", [None, Full(), Causal(), SlidingWindow(1), SlidingWindow(40), SlidingWindow(9, 2)])
def test_masks(mask: Any) -> None:
    cache = fill(make("latent", 4, torch.float32), LENGTHS, 4)
    check(queries(4, 2, 4, cache), cache, mask)


@pytest.mark.parametrize("page_size", [16, 32, 128])
@pytest.mark.parametrize("kind", ["paged", "paged int8"])
def test_pages_of_any_size_and_order(kind: str, page_size: int) -> None:
    cache = fill(make(kind, 3, torch.float32, page_size=page_size), [100, 17, 64], 1)
    cache.reorder(torch.tensor([2, 0, 0], device=DEVICE))  # rows share pages
    check(queries(3, 4, 1, cache), cache, Causal())


@pytest.mark.parametrize(("rank", "rope", "heads"), [(24, 8, 3), (72, 20, 2), (512, 64, 4), (32, 16, 130)])
def test_sizes_and_heads_of_any_number(rank: int, rope: int, heads: int) -> None:
    cache = fill(make("latent", 2, torch.float16 if rank > 256 else torch.float32, rank, rope), [35, 20], 1)
    check(queries(2, heads, 1, cache), cache)


def test_queries_past_a_rows_end_give_zero() -> None:
    cache = fill(make("latent", 3, torch.float32), [9, 4, 0], 3)
    q = queries(3, 2, 3, cache)
    check(q, cache, Causal(), [7, 3, 0])
    given = torch.tensor([7, 3, 0], device=DEVICE)
    out = latent_decode(*q, cache, scale=SCALE, mask=Causal(), starts=given, backend="triton")
    assert not out[0, :, 2].any() and not out[1, :, 1:].any() and not out[2].any() and out[0, :, 1].any()


def test_backends_agree_and_strided_queries_are_taken() -> None:
    cache = fill(make("latent", 2, torch.float32), [70, 70], 3)
    q = [part.transpose(2, 3).contiguous().transpose(2, 3) for part in queries(2, 4, 3, cache)]
    out = latent_decode(*q, cache, scale=SCALE, mask=Causal(), backend="triton")
    for other in ("attention", "reference"):
        torch.testing.assert_close(out, latent_decode(*q, cache, scale=SCALE, mask=Causal(), backend=other))


@pytest.mark.parametrize("kind", ["latent", "paged int8"])
def test_the_operator_passes_opcheck(kind: str) -> None:
    cache = fill(make(kind, 2, torch.float32), [40, 21], 1)
    held = cache.stored()
    recent = [] if held.recent is None else [held.recent.k[0], held.recent.v[0]]
    kept = Rows(0) if held.kept is None else held.kept
    shared = [held.lengths.base, held.lengths.base - 1, kept.base]
    q = queries(2, 2, 1, cache)
    tables = (held.table, held.lengths.more, held.lengths.more, kept.more)
    call = (*q, list(held.k), list(held.v), recent, *tables, shared, held.longest, 2**30, 0, False, SCALE)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op.latent_op, call, test_utils=tests)


def test_it_compiles_without_a_graph_break() -> None:
    cache = fill(make("latent", 2, torch.float32), [40, 21], 1)
    q = queries(2, 2, 1, cache)

    def step(q: Tensor, q_rope: Tensor) -> Tensor:
        return latent_decode(q, q_rope, cache, scale=SCALE, mask=Causal(), backend="triton") * 2

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(*q), step(*q))


def test_what_it_cannot_run_is_said() -> None:
    cache = fill(make("latent", 1, torch.float32), [40], 1)
    for mask, q_len, reason in ((Dilated(4, 2), 1, "has no 'dilated' mask"), (None, 17, "takes up to 16 queries")):
        with pytest.raises(ValueError, match=f"no backend can run this call\ntriton: .*{reason}"):
            latent_decode(*queries(1, 2, q_len, cache), cache, scale=SCALE, mask=mask, backend="triton")
