"""Decoding on a GPU at sizes that the interpreter cannot walk: long rows, graphs, addresses past 2**31, no waiting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnzoo.caches import ContiguousCache, Int8Cache, PagedCache, PagedInt8Cache, RollingCache
from attnzoo.caches.token_cache import TokenCache
from attnzoo.masks import Causal, Full, GlobalTokens, Mask, SlidingWindow
from attnzoo.ops import decode
from attnzoo.ops.decoding import Rows, Stored, explain_decode
from attnzoo.ops.decoding.reference import decode_reference
from tests.support.compare import assert_as_accurate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

FIRST_AND_NEAR = SlidingWindow(252) | (GlobalTokens(4) & Causal())


def filled(kind: str, counts: list[int], heads: int = 2, dtype: torch.dtype = torch.bfloat16) -> TokenCache:
    batch, room = len(counts), 8192
    options = {"head_dim": 128, "dtype": dtype, "device": "cuda"}
    if kind.startswith("paged"):
        cls = PagedInt8Cache if kind == "paged int8" else PagedCache
        cache: TokenCache = cls(batch, heads, room // 32 * batch, page_size=32, max_length=room, **options)
    else:
        cache = (Int8Cache if kind == "int8" else ContiguousCache)(batch, heads, room, **options)
    tokens = [torch.randn(batch, heads, max(counts), 128, device="cuda", dtype=dtype) for _ in range(2)]
    cache.append(*tokens, torch.tensor(counts))
    return cache


@pytest.mark.parametrize("kind", ["contiguous", "paged", "int8", "paged int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("group", "q_len"), [(1, 1), (4, 1), (8, 1), (32, 1), (5, 3), (8, 16)])
@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(1000), FIRST_AND_NEAR], ids=str)
def test_long_rows_err_at_most_twice_as_much_as_plain_pytorch(
    kind: str, dtype: torch.dtype, group: int, q_len: int, mask: Mask
) -> None:
    counts = [6001, 17, 8192]
    cache = filled(kind, counts, dtype=dtype)
    q = torch.randn(3, 2 * group, q_len, 128, device="cuda", dtype=dtype)
    starts = [count - q_len for count in counts]
    k, v = (part.nan_to_num() for part in cache.view())
    exact, plain = (
        decode_reference(q.to(to), k.to(to), v.to(to), counts, starts, mask=mask, scale=128**-0.5)
        for to in (torch.float64, dtype)
    )
    assert_as_accurate("out", decode(q, cache, mask=mask, backend="triton"), plain, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [1, 4])
def test_short_vectors_over_long_rows(dtype: torch.dtype, group: int) -> None:
    counts = [6001, 17, 8192]
    cache = ContiguousCache(3, 2, 8192, 64, dtype=dtype, device="cuda")
    cache.append(*(torch.randn(3, 2, 8192, 64, device="cuda", dtype=dtype) for _ in range(2)), torch.tensor(counts))
    q = torch.randn(3, 2 * group, 1, 64, device="cuda", dtype=dtype)
    starts, (k, v) = [count - 1 for count in counts], cache.view()
    exact, plain = (
        decode_reference(q.to(to), k.to(to), v.to(to), counts, starts, mask=Causal(), scale=0.125)
        for to in (torch.float64, dtype)
    )
    assert_as_accurate("out", decode(q, cache, mask=Causal(), backend="triton"), plain, exact)


@pytest.mark.parametrize("mask", [Full(), FIRST_AND_NEAR], ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "paged", "int8", "paged int8"])
def test_auto_takes_the_kernels_and_never_waits_for_the_gpu(kind: str, mask: Mask) -> None:
    cache, q = filled(kind, [4000, 3000]), torch.randn(2, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    assert explain_decode(q, cache, mask=mask).startswith("triton: runs")
    expected = decode(q, cache, mask=mask, backend="triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = decode(q, cache, mask=mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, expected)


@pytest.mark.parametrize("kind", ["contiguous", "paged", "int8", "paged int8"])
def test_further_calls_of_one_form_read_tensors_and_lengths_of_their_own(kind: str) -> None:
    room = torch.randn(2 * 8 * 128 + 1, device="cuda", dtype=torch.bfloat16)
    aligned, shifted = (room[at : at + 2 * 8 * 128].view(2, 8, 1, 128) for at in (0, 1))
    for counts in ([8000, 7000], [8190, 3], [4000, 4000], [4001, 4001]):
        cache = filled(kind, counts)
        for q in (torch.randn_like(aligned), aligned, shifted):
            k, v = (part.nan_to_num() for part in cache.view())
            starts = [count - 1 for count in counts]
            exact, plain = (
                decode_reference(q.to(to), k.to(to), v.to(to), counts, starts, mask=Full(), scale=128**-0.5)
                for to in (torch.float64, torch.bfloat16)
            )
            assert_as_accurate(f"out {counts}", decode(q, cache, backend="triton"), plain, exact)


class Growing:
    """A cache whose lengths are known to the device alone, as a captured graph has them."""

    def __init__(self, k: Tensor, v: Tensor, lengths: Tensor) -> None:
        self.k, self.v, self.lengths = k, v, lengths
        self.length, self.uniform, self.first, self.kept = k.shape[2], False, 0, None

    def stored(self) -> Stored:
        return Stored((self.k,), (self.v,), self.k.dtype, Rows(0, self.lengths), self.length)


def test_a_captured_graph_follows_the_lengths() -> None:
    k, v = (torch.randn(2, 2, 4096, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    lengths = torch.tensor([5, 2], device="cuda")
    cache, q = Growing(k, v, lengths), torch.randn(2, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    decode(q, cache)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode(q, cache)
    for counts in ([1, 0], [4096, 77], [300, 4095]):
        lengths.copy_(torch.tensor(counts))
        graph.replay()
        starts = [count - 1 for count in counts]
        exact, plain = (
            decode_reference(q.to(to), k.to(to), v.to(to), counts, starts, mask=Full(), scale=128**-0.5)
            for to in (torch.float64, torch.bfloat16)
        )
        assert_as_accurate(f"out {counts}", out, plain, exact)


@pytest.mark.parametrize("first", [4, 700])
def test_a_captured_graph_follows_the_window_and_reads_no_key_before_it_but_the_first(first: int) -> None:
    mask = SlidingWindow(252) | (GlobalTokens(first) & Causal())
    whole = [torch.randn(2, 2, 4096, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    k, v = (part.clone() for part in whole)
    lengths = torch.tensor([5, 2], device="cuda")
    cache, q = Growing(k, v, lengths), torch.randn(2, 8, 3, 128, device="cuda", dtype=torch.bfloat16)
    decode(q, cache, mask=mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode(q, cache, mask=mask)
    for counts in ([3, 0], [4096, 77], [300, 4095], [258, 951], [1000, 702]):
        lengths.copy_(torch.tensor(counts))
        starts = [count - 3 for count in counts]
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            for part, kept in zip((k, v), whole, strict=True):
                part[row] = kept[row]
                part[row, :, count:] = torch.nan
                part[row, :, first : max(start - 251, first)] = torch.nan
        graph.replay()
        exact, plain = (
            decode_reference(q.to(to), *(t.to(to) for t in whole), counts, starts, mask=mask, scale=128**-0.5)
            for to in (torch.float64, torch.bfloat16)
        )
        assert_as_accurate(f"out {counts}", out, plain, exact)


@pytest.mark.parametrize("q_len", [1, 5])
def test_a_ring_with_first_tokens_beside_it_is_read_at_any_age(q_len: int) -> None:
    cache = RollingCache(3, 2, 252, 128, margin=4, prefix=4, dtype=torch.bfloat16, device="cuda")
    for chunk in ([3, 1, 200], [2000, 0, 60], [q_len] * 3, [q_len] * 3):
        tokens = [torch.randn(3, 2, max(chunk), 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        cache.append(*tokens, torch.tensor(chunk))
    q = torch.randn(3, 8, q_len, 128, device="cuda", dtype=torch.bfloat16)
    columns = [length - first for length, first in zip(cache.row_lengths(), cache.first.tolist(), strict=True)]
    starts = [count - q_len for count in columns]
    k, v = cache.view()
    exact, plain = (
        decode_reference(q.to(to), k.to(to), v.to(to), columns, starts, mask=FIRST_AND_NEAR, scale=128**-0.5)
        for to in (torch.float64, torch.bfloat16)
    )
    assert columns[0] == 260 and explain_decode(q, cache, mask=FIRST_AND_NEAR).startswith("triton: runs")
    assert_as_accurate("out", decode(q, cache, mask=FIRST_AND_NEAR), plain, exact)


@pytest.mark.parametrize(("heads", "k_heads"), [(8, 2), (32, 1)])  # the last program merges, or each its share
def test_graphs_replayed_at_the_same_time_do_not_count_together(heads: int, k_heads: int) -> None:
    made = []
    for _ in range(2):
        cache = filled("contiguous", [8000, 7000], k_heads)
        q = torch.randn(2, heads, 1, 128, device="cuda", dtype=torch.bfloat16)
        expected = decode(q, cache)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = [decode(q, cache) for _ in range(20)]
        made.append((graph, outs, expected, torch.cuda.Stream(), cache, q))
    torch.cuda.synchronize()
    for _ in range(50):
        for graph, _, _, stream, *_ in made:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for _, outs, expected, *_ in made:
        assert all(torch.equal(out, expected) for out in outs)


def test_addresses_past_two_to_the_31_are_right() -> None:
    k = torch.zeros(3, 1, 2**23, 128, device="cuda", dtype=torch.bfloat16)  # the last row begins at 2**31 elements
    k[2, 0, -300:].normal_()
    lengths = torch.tensor([1, 1, 2**23], device="cuda")
    cache, q = Growing(k, k, lengths), torch.randn(3, 4, 1, 128, device="cuda", dtype=torch.bfloat16)
    out = decode(q, cache, mask=SlidingWindow(300))
    near = k[2:, :, -300:].double()
    exact = decode_reference(q[2:].double(), near, near, [300], [299], mask=Full(), scale=128**-0.5)
    assert (out[2:].double() - exact).abs().max() < 0.02 and not out[:2].any()


@pytest.mark.parametrize("kind", ["contiguous", "paged int8"])
def test_a_compiled_step_is_one_graph(kind: str) -> None:
    cache, q = filled(kind, [700, 300]), torch.randn(2, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    step = torch.compile(lambda q: decode(q, cache, mask=Causal()) * 2, fullgraph=True)
    torch.testing.assert_close(step(q), decode(q, cache, mask=Causal()) * 2)
