"""Latent decoding on a GPU at the sizes of real models."""

from __future__ import annotations

import pytest
import torch

from attnzoo.caches import Int8Cache, LatentCache, PagedCache
from attnzoo.caches.token_cache import TokenCache
from attnzoo.masks import Causal
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
