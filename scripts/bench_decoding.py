"""Time decoding over every cache beside the fastest kernels there are, on one GPU, in one process.

    python scripts/bench_decoding.py [--only bf16 int8 paged window first queries latent] [--out JSON] [--commit HASH]

Each case is timed twice. `ms`: the median of single calls, each after a write that empties the L2 cache (which has to
be written back while the call runs: about 10 us on an H200 that no call escapes) and after a wait on the device, in
which the host makes the call: what the host needs is `host_ms`. `graph_ms`: calls in a CUDA graph that go around
several sets of inputs, together four times the L2 cache. The limit is a large copy, measured beside them. A result
counts only if it is right: each is compared with plain PyTorch in fp32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peer_flashinfer
import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from attnzoo.bench.timing import one_call
from attnzoo.caches import ContiguousCache, Int8Cache, LatentCache, PagedCache, PagedInt8Cache
from attnzoo.caches.token_cache import TokenCache
from attnzoo.masks import Causal, Full, GlobalTokens, SlidingWindow
from attnzoo.ops import decode, latent_decode

try:
    import fa3_fwd_interface as fa3
except ImportError:
    fa3 = None

DTYPE, DIM, RANK, ROPE, SCALE = torch.bfloat16, 128, 512, 64, 192**-0.5
Run = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="what was measured, where there is no git")
    options = parser.parse_args()
    commit = options.commit or subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
    torch.manual_seed(0)
    limit = copy_rate()
    print(f"copy: {limit:.0f} GB/s", flush=True)
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    about |= {"commit": commit, "copy_gbs": limit, "dtype": str(DTYPE)}
    rows: list[dict[str, Any]] = []
    for group in options.only:
        for row in GROUPS[group]():
            row = {"group": group, **row, "of_copy": row["gbs"] / limit}
            rows.append(row)
            print(describe(row), flush=True)
        torch.cuda.empty_cache()
        if options.out:
            options.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


def describe(row: dict[str, Any]) -> str:
    ratios = "".join(f" {name} {row[name]:.3f}" for name in ("of_peer", "of_own") if name in row)
    extra = f" {row['tflops']:4.0f} TF/s" if "tflops" in row else ""
    times = f"{row['ms'] * 1e3:8.1f} us, graph {row['graph_ms'] * 1e3:8.1f} us, host {row['host_ms'] * 1e3:4.0f} us"
    rates = f"{row['gbs']:5.0f} GB/s {row['of_copy']:.2f} of copy{extra}{ratios}"
    return f"{row['case']:34s} {row['name']:18s} {times} {rates} error {row['error']:.1e}"


def bf16() -> Iterator[dict[str, Any]]:
    """Contiguous caches against every peer. `of_peer`: the best peer's time over ours."""
    for batch, heads, k_heads, length in SHAPES:
        case, peers = f"{heads}/{k_heads} heads, {batch} x {length}", []
        sets = copies(
            lambda b=batch, h=k_heads, n=length: filled("contiguous", b, h, n), batch * k_heads * length * 512
        )
        queries = [rand(batch, heads, 1, DIM) for _ in sets]
        truth = exact(queries[0], *sets[0].view())
        nbytes = batch * k_heads * length * DIM * 4
        for name, runs in peer_runs(queries, [cache.view() for cache in sets]):
            peers.append(timed(case, name, runs, nbytes, truth))
            yield peers[-1]
        runs = [lambda q=q, c=c: decode(q, c) for q, c in zip(queries, sets, strict=True)]
        yield compared(timed(case, "attnzoo", runs, nbytes, truth), peers, "of_peer")


def int8() -> Iterator[dict[str, Any]]:
    """Int8 caches, paged too. `of_own`: our time over that of the same cache in bf16."""
    for batch, heads, k_heads, length in ((16, 32, 8, 8192), (64, 32, 8, 8192), (16, 32, 8, 32768), (64, 32, 8, 32768)):
        case, own = f"{heads}/{k_heads} heads, {batch} x {length}", None
        for kind in ("contiguous", "int8", "paged int8"):
            cache, q = filled(kind, batch, k_heads, length), rand(batch, heads, 1, DIM)
            truth = exact(q[:2], *view_of(cache, 2))
            nbytes = batch * k_heads * length * (DIM * 4 if kind == "contiguous" else DIM * 2 + 8)
            row = timed(case, kind, [lambda q=q, c=cache: decode(q, c)], nbytes, truth)
            own = own or row
            yield row | {"of_own": row["ms"] / own["ms"], "graph_of_own": row["graph_ms"] / own["graph_ms"]}
            del cache


def paged() -> Iterator[dict[str, Any]]:
    """Paged caches. `of_own`: our time over that of the contiguous cache."""
    for batch, heads, k_heads, length in ((16, 32, 8, 8192), (64, 32, 8, 8192)):
        case, own = f"{heads}/{k_heads} heads, {batch} x {length}", None
        for page_size in (0, 16, 64, 256):
            kind = "paged" if page_size else "contiguous"
            cache, q = filled(kind, batch, k_heads, length, page_size=page_size), rand(batch, heads, 1, DIM)
            truth = exact(q[:2], *view_of(cache, 2))
            name = f"pages of {page_size}" if page_size else kind
            row = timed(case, name, [lambda q=q, c=cache: decode(q, c)], batch * k_heads * length * DIM * 4, truth)
            own = own or row
            yield row | {"of_own": row["ms"] / own["ms"], "graph_of_own": row["graph_ms"] / own["graph_ms"]}
            del cache


def window() -> Iterator[dict[str, Any]]:
    """A window of 1k in 32k tokens. `of_own`: our time over that of a cache of 1k."""
    for batch in (1, 16, 64):
        case, nbytes = f"32/8 heads, {batch} x 1024", batch * 8 * 1024 * DIM * 4
        own = None
        for name, length, mask in (("1k cache", 1024, Full()), ("1k window in 32k", 32768, SlidingWindow(1024))):
            count = min(max(2, -(-(2**28) // nbytes)), 2**34 // (batch * 8 * length * DIM * 4), 32)
            sets = [filled("contiguous", batch, 8, length) for _ in range(count)]
            q = rand(batch, 32, 1, DIM)
            k, v = view_of(sets[0], 2)
            truth = exact(q[:2], k[:, :, -1024:], v[:, :, -1024:])
            row = timed(case, name, [lambda q=q, c=c, m=mask: decode(q, c, mask=m) for c in sets], nbytes, truth)
            own = own or row
            yield row | {"of_own": row["ms"] / own["ms"], "graph_of_own": row["graph_ms"] / own["graph_ms"]}
            del sets


def first() -> Iterator[dict[str, Any]]:
    """A window of 252 and the 4 first tokens. `of_own`: time over that of a plain window of 256, as many keys."""
    keys = {"window 256": 256, "252 and 4 first": 256, "full": None}
    masks = (SlidingWindow(256), SlidingWindow(252) | (GlobalTokens(4) & Causal()), Full())
    for batch in (1, 16, 64):
        for length in (4096, 32768):
            case, own = f"32/8 heads, {batch} x {length}", None
            count = min(max(2, -(-(2**28) // (batch * 8 * 256 * DIM * 4))), 2**34 // (batch * 8 * length * DIM * 4), 32)
            sets = [filled("contiguous", batch, 8, length) for _ in range(count)]
            q = rand(batch, 32, 1, DIM)
            k, v = view_of(sets[0], 2)
            for (name, seen), mask in zip(keys.items(), masks, strict=True):
                at = mask.visible(torch.tensor(length - 1), torch.arange(length)).to(k.device)
                truth = exact(q[:2], k[:, :, at], v[:, :, at])
                nbytes = batch * 8 * (seen or length) * DIM * 4
                row = timed(case, name, [lambda q=q, c=c, m=mask: decode(q, c, mask=m) for c in sets], nbytes, truth)
                own = own or row
                yield row | {"of_own": row["ms"] / own["ms"], "graph_of_own": row["graph_ms"] / own["graph_ms"]}
            del sets, k, v


def queries() -> Iterator[dict[str, Any]]:
    """Several queries a step, and rows of random length (bytes counted are those of real tokens)."""
    cache = filled("contiguous", 16, 8, 8192)
    own = None
    for count in (1, 4, 8, 16):
        q = rand(16, 32, count, DIM)
        truth = exact(q[:2], *view_of(cache, 2))
        nbytes = 16 * 8 * 8192 * DIM * 4
        row = timed(
            "32/8 heads, 16 x 8192",
            f"{count} queries",
            [lambda q=q, c=cache: decode(q, c, mask=Causal())],
            nbytes,
            truth,
        )
        own = own or row
        yield row | {"of_own": row["ms"] / own["ms"], "graph_of_own": row["graph_ms"] / own["graph_ms"]}
    del cache
    cache = filled("contiguous", 64, 8, 8192)
    counts = torch.randint(1, 8193, (64,))
    cache.crop(counts)
    q = rand(64, 32, 1, DIM)
    k, v = cache.view()
    truth = torch.cat([exact(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n]) for b, n in enumerate(counts[:2])])
    nbytes = int(counts.sum()) * 8 * DIM * 4
    yield timed("32/8 heads, 64 x random to 8192", "attnzoo", [lambda: decode(q, cache)], nbytes, truth)


def latent() -> Iterator[dict[str, Any]]:
    """Absorbed latent attention over contiguous, paged and int8 latents. `of_peer`: FA3's time over ours."""
    for heads, batch in ((128, 16), (128, 64), (16, 16), (16, 64)):
        case, peers, length = f"{heads} heads, {batch} x 8192", [], 8192
        flops = 2 * batch * heads * length * (2 * RANK + ROPE)
        for kind in ("latent", "paged", "int8"):
            count = 1 if kind != "latent" or batch > 16 else 3
            sets = [filled(kind, batch, 1, length, RANK, ROPE) for _ in range(count)]
            q, q_rope = rand(batch, heads, 1, RANK), rand(batch, heads, 1, ROPE)
            c, r = view_of(sets[0], 2)
            truth = exact(torch.cat([q, q_rope], -1)[:2], torch.cat([c, r], -1), c, SCALE)
            nbytes = batch * length * ((RANK + ROPE) * 2 if kind != "int8" else RANK + ROPE + 8)
            if kind == "latent" and fa3 is not None:
                args = [[part.transpose(1, 2).contiguous() for part in cache.view()] for cache in sets]
                args = [(q_rope.transpose(1, 2), *pair[::-1], q.transpose(1, 2)) for pair in args]
                runs = [lambda a=a: fa3.flash_attn_with_kvcache(*a[:3], qv=a[3], softmax_scale=SCALE) for a in args]
                runs = [lambda run=run: run().transpose(1, 2) for run in runs]
                peers.append(timed(case, "FA3 qv", runs, nbytes, truth, flops))
                yield peers[-1]
                del args
            if kind == "latent":
                for name, runs in peer_flashinfer.latent_runs(q, q_rope, [cache.view() for cache in sets], SCALE):
                    peers.append(timed(case, name, runs, nbytes, truth, flops))
                    yield peers[-1]
            runs = [lambda c=c, q=q, p=q_rope: latent_decode(q, p, c, scale=SCALE) for c in sets]
            yield compared(timed(case, kind, runs, nbytes, truth, flops), peers, "of_peer")
            del sets, runs


SHAPES = ((1, 32, 8, 32768), (16, 32, 32, 8192), (16, 32, 8, 8192), (16, 32, 1, 8192), (64, 32, 8, 8192))
GROUPS = {"bf16": bf16, "int8": int8, "paged": paged, "window": window, "first": first, "queries": queries}
GROUPS["latent"] = latent


def peer_runs(queries: list[Tensor], views: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[str, list[Run]]]:
    """What else decodes over contiguous keys and values."""

    def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])

    for name, backend in (("FA2", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
        pairs = zip(queries, views, strict=True)
        yield name, [lambda q=q, kv=kv, b=backend: sdpa(q, *kv, b) for q, kv in pairs]
    if fa3 is not None:
        inputs = [
            [part.transpose(1, 2).contiguous() for part in (q, *kv)] for q, kv in zip(queries, views, strict=True)
        ]
        yield "FA3", [lambda i=i: fa3.flash_attn_with_kvcache(*i).transpose(1, 2) for i in inputs]
    yield from peer_flashinfer.decode_runs(queries, views)


def timed(
    case: str, name: str, runs: list[Run], nbytes: int, truth: Tensor, flops: int | None = None
) -> dict[str, Any]:
    """A row of the table; one run for each set of inputs, the first of which gives `truth` (of its first rows)."""
    got = runs[0]().float()[: truth.shape[0]]
    error = ((got - truth).norm() / truth.norm()).item()
    if not error < 1e-2:
        raise RuntimeError(f"{name}, {case}: relative error {error}")
    ms, host_ms = one_call(runs[0])
    graph_ms = graph_time(runs)
    row = {"case": case, "name": name, "ms": ms, "graph_ms": graph_ms, "gbs": nbytes / ms / 1e6, "error": error}
    row["host_ms"] = host_ms
    row["graph_gbs"] = nbytes / graph_ms / 1e6
    return row if flops is None else row | {"tflops": flops / ms / 1e9, "graph_tflops": flops / graph_ms / 1e9}


def compared(row: dict[str, Any], peers: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The row with the ratio of the best peer's time to its own, in both ways of timing."""
    if peers:
        row |= {
            f"{prefix}{name}": min(peer[f"{prefix}ms"] for peer in peers) / row[f"{prefix}ms"]
            for prefix in ("", "graph_")
        }
    return row


def graph_time(runs: list[Run], rounds: int = 4) -> float:
    """Milliseconds a call, in a graph that goes around the inputs."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for run in runs:
                run()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / rounds / len(runs))
    return sorted(times[1:])[3]


def copy_rate() -> float:
    """GB/s read and written by a copy of 2 GiB."""
    x = torch.empty(2**31, device="cuda", dtype=torch.uint8)
    y = torch.empty_like(x)
    return 2 * x.numel() / do_bench(lambda: y.copy_(x), return_mode="median") / 1e6


def copies(make: Callable[[], TokenCache], nbytes: int) -> list[TokenCache]:
    """As many sets of inputs as fill the L2 cache four times, at least one."""
    return [make() for _ in range(max(1, -(-(4 * 60 * 2**20) // nbytes)))]


def filled(
    kind: str, batch: int, heads: int, length: int, dim: int = DIM, v_dim: int = DIM, page_size: int = 64
) -> TokenCache:
    """A full cache of random numbers; pages stand in random order."""
    options: dict[str, Any] = {"head_dim": dim, "v_head_dim": v_dim, "dtype": DTYPE, "device": "cuda"}
    if kind == "latent":
        cache: TokenCache = LatentCache(batch, length, dim, v_dim, dtype=DTYPE, device="cuda")
    elif kind.startswith("paged"):
        pages = batch * length // page_size
        made = PagedInt8Cache if kind == "paged int8" else PagedCache
        cache = made(batch, heads, pages, page_size=page_size, max_length=length, **options)
        order = torch.randperm(pages).tolist()
        cache._pool._free = order  # scattered, as in a server that has run for a while
    else:
        cache = {"contiguous": ContiguousCache, "int8": Int8Cache}[kind](batch, heads, length, **options)
    step = max(min(length, 2**27 // (batch * heads * dim)), 1)
    for at in range(0, length, step):
        new = min(step, length - at)
        cache.append(rand(batch, heads, new, dim), rand(batch, heads, new, v_dim))
    return cache


def view_of(cache: TokenCache, rows: int) -> tuple[Tensor, Tensor]:
    """The first rows of the cache's view."""
    k, v = cache.view()
    return k[:rows], v[:rows]


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=DTYPE)


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Plain attention in fp32, the queries causal among themselves; for the batch rows that `k` has."""
    q = q[: k.shape[0]].float().unflatten(1, (k.shape[1], -1))  # [B, Hk, group, Sq, D]
    scores = torch.einsum("bhgqd,bhnd->bhgqn", q, k.float()) * (q.shape[-1] ** -0.5 if scale is None else scale)
    i = torch.arange(q.shape[3], device=q.device)[:, None] + k.shape[2] - q.shape[3]
    scores = scores.masked_fill(torch.arange(k.shape[2], device=q.device) > i, -torch.inf)
    return torch.einsum("bhgqn,bhnd->bhgqd", scores.softmax(-1), v.float()).flatten(1, 2)


if __name__ == "__main__":
    main()
