"""One more token of each row into a cache's memory, where the device alone knows how many it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.decoding.stored import Stored
from attnzoo.ops.launching import interpreted, triton_reasons

Encode = Callable[[Tensor], Sequence[Tensor]]


def store(
    held: Stored, k: Tensor, v: Tensor, before: Tensor, encode: tuple[Encode, Encode], *, fused: bool | None = None
) -> None:
    """Put each row's next key and value into their places; on the device only.

    Args:
        held: the memory that is written to.
        k: `[B, Hk, 1, D]` of the cache's dtype.
        v: `[B, Hk, 1, Dv]`, likewise.
        before: tokens that each row holds, `[B]` int64; there must be room for one more.
        encode: what a cache's form makes of vectors `[B, Hk, D]`, for keys and for values.
        fused: whether by one kernel; None: where that can be.
    """
    if fused is None:
        fused = not interpreted() and _fits(held, k, v)
    if fused:
        _launch(held, k, v, before)
        return
    blocks, slots = places(held, before)
    beside = torch.where(before < held.prefix, held.size + before, slots) if held.ring and held.prefix else None
    for parts, new, code in ((held.k, k, encode[0]), (held.v, v, encode[1])):
        vectors = new[:, :, 0]  # [B, Hk, D]
        for part, piece in zip(parts, code(vectors) if len(parts) > 1 else (vectors,), strict=True):
            part[blocks, :, slots] = piece
            if beside is not None:
                part[blocks, :, beside] = piece
    if held.recent is not None:
        rows, slots = torch.arange(held.batch, device=k.device), before % held.recent.size
        held.recent.k[0][rows, :, slots] = k[:, :, 0]
        held.recent.v[0][rows, :, slots] = v[:, :, 0]


def places(held: Stored, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks and slots where tokens of these positions stand, `[B]` or `[B, n]`."""
    rows = torch.arange(held.batch, device=positions.device)
    rows = rows if positions.dim() == 1 else rows[:, None]
    if held.table is not None:
        return held.table[rows, positions // held.size].long(), positions % held.size
    return rows, positions % held.size if held.ring else positions


def _fits(held: Stored, k: Tensor, v: Tensor) -> bool:
    dense = (*held.k[1:], *held.v[1:], *((held.recent.k[0], held.recent.v[0]) if held.recent is not None else ()))
    return (
        not triton_reasons(k.device)
        and len(held.k) == len(held.v) <= 2
        and all(t.is_contiguous() for t in dense)
        and held.k[0].stride(3) == held.v[0].stride(3) == 1
        and max(k.shape[3], v.shape[3]) <= 1024
    )


def _launch(held: Stored, k: Tensor, v: Tensor, before: Tensor) -> None:
    k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (k, v))
    quantised, recent, table = len(held.k) > 1, held.recent, held.table
    dims = {"D": k.shape[3], "DV": v.shape[3]}
    _kernel()[(held.heads, held.batch)](
        *(before, k, v, held.k[0], held.k[1] if quantised else None, held.v[0], held.v[1] if quantised else None),
        *((None, None) if recent is None else (recent.k[0], recent.v[0])),
        *(table, held.size, 0 if recent is None else recent.size, held.heads, 0 if table is None else table.stride(0)),
        *(*k.stride()[:2], *v.stride()[:2], *held.k[0].stride()[:3], *held.v[0].stride()[:3]),
        **dims,
        QUANT=quantised,
        RING=held.ring,
        RECENT=recent is not None,
        PREFIX=held.prefix if held.ring else 0,
        **{f"BLOCK_{name}": 1 << (size - 1).bit_length() for name, size in dims.items()},
        num_warps=1 if max(dims.values()) <= 256 else 4,
    )


@lru_cache(maxsize=1)
def _kernel() -> Any:
    """Triton is imported here, at the first use."""
    from attnzoo.ops.decoding.triton.storing import store_kernel

    return store_kernel
