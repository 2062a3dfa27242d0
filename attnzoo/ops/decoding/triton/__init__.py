"""Flash-decoding kernels: what they can run, and the way from a call to them."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from attnzoo.masks import Mask
from attnzoo.ops.decoding.common import Call
from attnzoo.ops.decoding.limits import limits
from attnzoo.ops.decoding.stored import Rows
from attnzoo.ops.decoding.triton.op import decode, decode_op
from attnzoo.ops.launching import is_plain, triton_reasons

_MOST_QUERIES = 16
_WIDEST = 256


def reasons(call: Call) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    q, held = call.q, call.stored
    k, v = held.k[0], held.v[0]
    trained = torch.is_grad_enabled() and (q.requires_grad or (call.sinks is not None and call.sinks.requires_grad))
    cast = torch.is_autocast_enabled(q.device.type)
    limit = limits(call.mask)
    pattern = call.mask.pattern if limit is None else None
    whole = not held.ring and isinstance(held.origin, int) and held.origin == 0
    moved = limit is not None and limit.prefix > held.prefix and not whole
    sizes = q.shape[2], k.shape[3], v.shape[3]
    dense, alike = k.stride(3) == v.stride(3) == 1, len(held.k) == len(held.v)
    found = _reasons if torch.compiler.is_compiling() else _kept_reasons
    return list(found(q.device, q.dtype, held.dtype, sizes, pattern, moved, dense, alike, cast, trained))


def _reasons(
    device: torch.device,
    dtype: torch.dtype,
    kept: torch.dtype,
    sizes: tuple[int, int, int],
    pattern: str | None,
    moved: bool,
    dense: bool,
    alike: bool,
    cast: bool,
    trained: bool,
) -> tuple[str, ...]:
    out, (q_len, dim, v_dim) = triton_reasons(device), sizes
    if pattern is not None:
        out.append(f"has no {pattern!r} mask")
    if moved:
        out.append("finds first tokens only where nothing was dropped")
    if q_len > _MOST_QUERIES:
        out.append(f"takes up to {_MOST_QUERIES} queries, not {q_len}")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        out.append(f"has no {dtype}")
    if cast:
        out.append("does not cast under autocast")
    elif dtype != kept:
        out.append(f"wants queries of the cache's {kept}, not {dtype}")
    if not (1 <= dim <= _WIDEST and 1 <= v_dim <= _WIDEST):
        out.append(f"takes vectors of 1 to {_WIDEST} numbers, not {dim} and {v_dim}")
    if not dense:
        out.append("wants vectors without strides")
    if not alike:
        out.append("wants keys and values in one form")
    if trained:
        out.append("has no backward")
    return tuple(out)


_kept_reasons = lru_cache(maxsize=256)(_reasons)


def run(call: Call) -> Tensor:
    """The result, `[B, Hq, Sq, Dv]`."""
    q, held = call.q, call.stored
    limit = limits(call.mask)
    assert limit is not None
    start = rows_of(call.starts - held.origin)
    kept = Rows(0) if held.kept is None else held.kept
    return (decode if is_plain(q) else decode_op)(
        dense_last(q),
        held.k,
        held.v,
        () if held.recent is None else (held.recent.k[0], held.recent.v[0]),
        held.table,
        held.lengths.more,
        start.more,
        kept.more,
        call.sinks,
        (held.lengths.base, start.base, kept.base),
        held.longest,
        *limit,
        held.size if held.ring else 0,
        q.shape[-1] ** -0.5 if call.scale is None else call.scale,
        call.softcap,
    )


def bounds(mask: Mask) -> tuple[int, int] | None:
    """(back, ahead): query i sees key j iff -ahead <= i - j < back; None for a mask that does not say so."""
    limit = limits(mask)
    return None if limit is None or limit.prefix else limit[:2]


def rows_of(value: int | Tensor) -> Rows:
    """One number for all rows, or one for each."""
    return Rows(0, value) if isinstance(value, Tensor) else Rows(value)


def dense_last(x: Tensor) -> Tensor:
    """The tensor with a last stride of 1."""
    return x if x.stride(-1) == 1 else x.contiguous()
