"""FlashInfer as a contestant of `scripts/bench_decoding.py`: pages of 64 tokens, by CUDA cores and by tensor cores.

FlashInfer plans a batch once and then runs it for each layer; only runs are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

try:
    import flashinfer
except ImportError:
    flashinfer = None

Run = Callable[[], Tensor]
PAGE = 64
WORKSPACE = 2**30  # bytes, for splits' shares; runs come one after another and share it


def decode_runs(queries: list[Tensor], views: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[str, list[Run]]]:
    """Both ways in which it decodes one query a row, `[B, Hq, 1, D]`, over keys and values `[B, Hk, n, D]`.

    What it cannot do, such as groups of 32 heads without tensor cores, is named and left out.
    """
    for name, options in (("FlashInfer", {}), ("FlashInfer TC", {"use_tensor_cores": True, "backend": "fa2"})):
        yield from _tried(name, lambda o=options: [_decode(q, *kv, o) for q, kv in zip(queries, views, strict=True)])


def latent_runs(
    q: Tensor, q_rope: Tensor, views: list[tuple[Tensor, Tensor]], scale: float
) -> Iterator[tuple[str, list[Run]]]:
    """Absorbed latent attention of `q [B, H, 1, R]` and `q_rope [B, H, 1, Dr]`; views are latents and rope keys."""
    yield from _tried("FlashInfer fa3", lambda: [_latent(q, q_rope, *view, scale) for view in views])


def _tried(name: str, make: Callable[[], list[Run]]) -> Iterator[tuple[str, list[Run]]]:
    if flashinfer is None:
        return
    try:
        runs = make()
        runs[0]()
    except Exception as error:  # what a peer cannot do is a fact
        print(f"{name}: {type(error).__name__}: {error}".splitlines()[0][:160], flush=True)
        return
    yield name, runs


def _decode(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Run:
    batch, k_heads, length, dim = k.shape
    pages = tuple(_paged(t) for t in (k, v))
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(q.device), "NHD", **options)
    starts, order, _ = _table(batch, length, q.device)
    last = torch.full((batch,), PAGE, dtype=torch.int32, device=q.device)
    wrapper.plan(starts, order, last, q.shape[1], k_heads, dim, PAGE, q_data_type=q.dtype, kv_data_type=k.dtype)
    rows = q[:, :, 0].contiguous()  # [B, Hq, D]
    return lambda: wrapper.run(rows, pages)[:, :, None]


def _latent(q: Tensor, q_rope: Tensor, c: Tensor, r: Tensor, scale: float) -> Run:
    batch, length = c.shape[0], c.shape[2]
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(_workspace(q.device), backend="fa3")
    starts, order, lengths = _table(batch, length, q.device)
    each = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    wrapper.plan(
        each, starts, order, lengths, q.shape[1], q.shape[3], q_rope.shape[3], PAGE, False, scale, q.dtype, c.dtype
    )
    rows, rope = q[:, :, 0].contiguous(), q_rope[:, :, 0].contiguous()
    latents, keys = (t.reshape(-1, PAGE, t.shape[3]) for t in (c, r))  # [B * n / PAGE, PAGE, ...]
    return lambda: wrapper.run(rows, rope, latents, keys)[:, :, None]


def _paged(x: Tensor) -> Tensor:
    """`[B, H, n, D]` as pages `[B * n / PAGE, PAGE, H, D]`, one row's after the other's."""
    return x.transpose(1, 2).unflatten(1, (-1, PAGE)).flatten(0, 1).contiguous()


def _table(batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where each row's pages start, the pages, and each row's tokens; int32."""
    count = length // PAGE
    numbers = torch.arange(batch * count, dtype=torch.int32, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * count
    return starts, numbers, torch.full((batch,), length, dtype=torch.int32, device=device)


@lru_cache(maxsize=1)
def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)
