"""Latent decoding on a GPU at the sizes of real models."""

from __future__ import annotations

import pytest
import torch

from attnzoo.caches import Int8Cache, LatentCache, PagedCache, RollingCache
from attnzoo.caches.token_cache import TokenCache
from attnzoo.masks import Causal, Mask, SlidingWindow
from attnzoo.ops import latent_decode
from attnzoo.ops.latent.reference import latent_decode_reference
from tests.support.compare import assert_as_accurate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

SCALE = 192**-0.5


def filled(kind: str, counts: list[int], dtype: torch.dtype = torch.bfloat16) -> TokenCache:
    batch, options = len(counts), {"dtype": dtype, "device": "cuda"}
    if kind == "latent":
        cache: TokenCache = LatentCache(batch, 4096, 512, 64, **options)
    elif kind == "paged":
        cache = PagedCache(batch, 1, 64 * batch, 512, 64, page_size=64, max_length=4096, **options)
    else:
        cache = Int8Cache(batch, 1, 4096, 512, 64, **options)
    tokens = [torch.randn(batch, 1, max(counts), n, device="cuda", dtype=dtype) for n in (512, 64)]
    cache.append(*tokens, torch.tensor(counts))
    return cache


@pytest.mark.parametrize("kind", ["latent", "paged", "int8"])
@pytest.mark.parametrize(("heads", "q_len"), [(16, 1), (128, 1), (20, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_long_rows_err_at_most_twice_as_much_as_plain_pytorch(
    kind: str, heads: int, q_len: int, dtype: torch.dtype
) -> None:
    counts = [3001, 17, 4096]
    cache = filled(kind, counts, dtype)
    q = [torch.randn(3, heads, q_len, n, device="cuda", dtype=dtype) for n in (512, 64)]
    views = [part.nan_to_num() for part in cache.view()]
    starts = [count - q_len for count in counts]
    exact, plain = (
        latent_decode_reference(*(x.to(to) for x in (*q, *views)), counts, starts, scale=SCALE, mask=Causal())
        for to in (torch.float64, dtype)
    )
    got = latent_decode(*q, cache, scale=SCALE, mask=Causal(), backend="triton")
    assert_as_accurate("out", got, plain, exact)


@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(70), SlidingWindow(1000)], ids=str)
@pytest.mark.parametrize(("heads", "q_len"), [(128, 1), (64, 2), (40, 3), (100, 1)])
@pytest.mark.parametrize("page_size", [None, 16, 64, 256])
def test_many_heads_get_what_few_get(mask: Mask, heads: int, q_len: int, page_size: int | None) -> None:
    counts = [2049, 5, 64, 3800, 1]
    cache = filled("latent", counts)
    if page_size is not None:
        tokens, pages = [part.nan_to_num() for part in cache.view()], 5 * 4096 // page_size
        options = {"page_size": page_size, "max_length": 4096, "dtype": torch.bfloat16, "device": "cuda"}
        cache = PagedCache(5, 1, pages, 512, 64, **options)
        cache._pool._free = torch.randperm(pages).tolist()
        cache.append(*tokens, torch.tensor(counts))
    starts = (torch.tensor(counts, device="cuda") - q_len).clamp(min=0)
    check_many_heads(cache, heads, q_len, mask, starts)


def test_many_heads_read_rings() -> None:
    cache = RollingCache(2, 1, 300, 512, 64, margin=9, dtype=torch.bfloat16, device="cuda")
    cache.append(*(torch.randn(2, 1, 250, n, device="cuda", dtype=torch.bfloat16) for n in (512, 64)))
    for _ in range(3):
        cache.append(*(torch.randn(2, 1, 90, n, device="cuda", dtype=torch.bfloat16) for n in (512, 64)))
        check_many_heads(cache, 128, 2, SlidingWindow(300), None)


def check_many_heads(cache: TokenCache, heads: int, q_len: int, mask: Mask, starts: torch.Tensor | None) -> None:
    """The kernel that takes many heads against the one that takes eight at a time."""
    batch, options = cache.batch_size, {"scale": SCALE, "mask": mask, "starts": starts, "backend": "triton"}
    q = [torch.randn(batch, heads, q_len, n, device="cuda", dtype=torch.bfloat16) for n in (512, 64)]
    few = [latent_decode(*(x[:, at : at + 8] for x in q), cache, **options) for at in range(0, heads, 8)]
    torch.testing.assert_close(latent_decode(*q, cache, **options), torch.cat(few, 1), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("kind", ["latent", "paged", "int8"])
def test_auto_takes_the_kernel_and_a_captured_graph_repeats_it(kind: str) -> None:
    cache = filled(kind, [4000, 3000])
    q = [torch.randn(2, 128, 1, n, device="cuda", dtype=torch.bfloat16) for n in (512, 64)]
    expected = latent_decode(*q, cache, scale=SCALE, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = latent_decode(*q, cache, scale=SCALE)
    graph.replay()
    assert torch.equal(out, expected)
