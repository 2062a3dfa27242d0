"""The kernel for attention in latent space: what it can run, and the way from a call to it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from attnzoo.ops.decoding import Rows
from attnzoo.ops.decoding.triton import bounds, dense_last, rows_of
from attnzoo.ops.latent.common import Call
from attnzoo.ops.latent.triton.op import latent_decode, latent_op
from attnzoo.ops.launching import is_plain, triton_reasons

_MOST_QUERIES = 16
_WIDEST = {"kv_lora_rank": 512, "qk_rope_head_dim": 128}
_WIDEST_FP32 = 256  # longer sums, one after another, would lose digits to plain PyTorch's


def reasons(call: Call) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    q, rope, held = call.q_latent, call.q_rope, call.stored
    latent, key = held.k[0], held.v[0]
    pattern = call.mask.pattern if bounds(call.mask) is None else None
    sizes, dense = (q.shape[2], latent.shape[3], key.shape[3]), latent.stride(3) == key.stride(3) == 1
    cast = torch.is_autocast_enabled(q.device.type)
    trained = torch.is_grad_enabled() and (q.requires_grad or rope.requires_grad)
    found = _reasons if torch.compiler.is_compiling() else _kept_reasons
    out = list(found(q.device, (q.dtype, rope.dtype, held.dtype), sizes, pattern, dense, cast, trained))
    return [*out, "reads no first tokens beside a ring"] if held.ring and held.prefix else out


def _reasons(
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    sizes: tuple[int, int, int],
    pattern: str | None,
    dense: bool,
    cast: bool,
    trained: bool,
) -> tuple[str, ...]:
    out, (q_len, *given), (dtype, rope, kept) = triton_reasons(device), sizes, dtypes
    if pattern is not None:
        out.append(f"has no {pattern!r} mask")
    if q_len > _MOST_QUERIES:
        out.append(f"takes up to {_MOST_QUERIES} queries, not {q_len}")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        out.append(f"has no {dtype}")
    if cast:
        out.append("does not cast under autocast")
    elif not dtype == rope == kept:
        out.append(f"wants queries of the cache's {kept}, not {dtype} and {rope}")
    for (name, widest), size in zip(_WIDEST.items(), given, strict=True):
        if size > widest:
            out.append(f"takes a {name} of up to {widest}, not {size}")
    if not dense:
        out.append("wants vectors without strides")
    if dtype == torch.float32 and given[0] > _WIDEST_FP32:
        out.append(f"takes a kv_lora_rank of up to {_WIDEST_FP32} in fp32, not {given[0]}")
    if trained:
        out.append("has no backward")
    return tuple(out)


_kept_reasons = lru_cache(maxsize=256)(_reasons)


def run(call: Call) -> Tensor:
    """The result, `[B, H, Sq, R]`."""
    held, limits = call.stored, bounds(call.mask)
    assert limits is not None
    start = rows_of(call.starts - held.origin)
    kept = Rows(0) if held.kept is None else held.kept
    return (latent_decode if is_plain(call.q_latent) else latent_op)(
        dense_last(call.q_latent),
        dense_last(call.q_rope),
        held.k,
        held.v,
        () if held.recent is None else (held.recent.k[0], held.recent.v[0]),
        held.table,
        held.lengths.more,
        start.more,
        kept.more,
        (held.lengths.base, start.base, kept.base),
        held.longest,
        *limits,
        held.ring,
        call.scale,
    )
