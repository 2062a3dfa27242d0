"""The kernel for attention in latent space: what it can run, and the way from a call to it."""

from __future__ import annotations

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
    q, held = call.q_latent, call.stored
    out = triton_reasons(q.device)
    if bounds(call.mask) is None:
        out.append(f"has no {call.mask.pattern!r} mask")
    if q.shape[2] > _MOST_QUERIES:
        out.append(f"takes up to {_MOST_QUERIES} queries, not {q.shape[2]}")
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        out.append(f"has no {q.dtype}")
    if torch.is_autocast_enabled(q.device.type):
        out.append("does not cast under autocast")
    elif not q.dtype == call.q_rope.dtype == held.dtype:
        out.append(f"wants queries of the cache's {held.dtype}, not {q.dtype} and {call.q_rope.dtype}")
    for (name, widest), vectors in zip(_WIDEST.items(), (held.k[0], held.v[0]), strict=True):
        if vectors.shape[3] > widest:
            out.append(f"takes a {name} of up to {widest}, not {vectors.shape[3]}")
        if vectors.stride(3) != 1:
            out.append("wants vectors without strides")
    if q.dtype == torch.float32 and q.shape[3] > _WIDEST_FP32:
        out.append(f"takes a kv_lora_rank of up to {_WIDEST_FP32} in fp32, not {q.shape[3]}")
    if torch.is_grad_enabled() and (q.requires_grad or call.q_rope.requires_grad):
        out.append("has no backward")
    return out


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
