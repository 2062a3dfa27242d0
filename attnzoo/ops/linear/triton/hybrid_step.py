"""The operator of a hybrid step: a few new tokens over a window and a state that are written in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.launching import interpreted, is_plain, triton_reasons
from attnzoo.ops.linear.common import State
from attnzoo.ops.linear.tail import Ring
from attnzoo.ops.linear.triton.launch import launch, rows_contiguous
from attnzoo.ops.linear.triton.shapes import power_of_two

_LARGEST = 256  # of keys and values; a program holds all columns of its outputs
_GROUP = 32  # query heads of a program
_SLAB = 4096  # elements of the state that a program looks at together
_EXACT = 32, 16  # rows of the state and keys looked at together without tensor cores, which would explode the code
_WARPS, _STAGES = 4, 1  # tokens of one call read what the one before wrote: nothing may be fetched ahead


def hybrid_step_reasons(q: Tensor, f_q: Tensor, f_k: Tensor, v: Tensor, state: State, ring: Ring) -> list[str]:
    """Why the kernel cannot run the call; empty if it can."""
    out = triton_reasons(q.device)
    if torch.float64 in (q.dtype, f_q.dtype, v.dtype):
        out.append("has no fp64")
    if q.dtype != v.dtype:
        out.append("takes queries, keys and values of one dtype")
    for name, size in (("keys", q.shape[3]), ("values", v.shape[3])):
        if not 1 <= size <= _LARGEST:
            out.append(f"takes {name} of 1 to {_LARGEST}, here {size}")
    if q.shape[1] > _GROUP * v.shape[1]:
        out.append(f"takes {_GROUP} query heads a key head at most, here {q.shape[1] // v.shape[1]}")
    if ring.keys is None and ring.features.dtype != q.dtype:
        out.append("takes features of the keys' dtype where they are the keys")
    if 0 in q.shape[:2] or q.shape[0] > 65535:
        out.append("steps 1 to 65535 rows")
    if not all(t is None or t.is_contiguous() for t in (*state, *ring)):
        out.append("writes into a state and a ring of one piece each")
    return out


def hybrid_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f_q: Tensor,
    f_k: Tensor,
    state: State,
    ring: Ring,
    before: Tensor,
    lengths: Tensor | None,
    gain: Tensor | None,
    feature_map: str,
    scale: float,
) -> Tensor:
    """Output `[B, Hq, S, Dv]`; state and ring are updated in place."""
    run: Any = _step if is_plain(q) else hybrid_attention_triton_step
    assert state.z is not None
    memory = state.s, state.z, ring.keys, ring.features, ring.v
    features = None if f_q is q else f_q, None if f_k is k else f_k
    return run(q, k, v, *features, *memory, before, lengths, gain, feature_map, scale)  # type: ignore[no-any-return]


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f_q: Tensor | None,
    f_k: Tensor | None,
    s: Tensor,
    z: Tensor,
    ring_k: Tensor | None,
    ring_f: Tensor,
    ring_v: Tensor,
    before: Tensor,
    lengths: Tensor | None,
    gain: Tensor | None,
    feature_map: str,
    scale: float,
) -> Tensor:
    """The output; `s`, `z` and the ring are written. Where no features are given they are the queries and the keys."""
    from attnzoo.ops.linear.triton import kernels_hybrid_step as kernels

    q, k, v = (rows_contiguous(t) for t in (q, k, v))
    f_q, f_k = q if f_q is None else rows_contiguous(f_q), k if f_k is None else rows_contiguous(f_k)
    (batch, heads, tokens, dim), kv_heads = q.shape, k.shape[1]
    out = v.new_empty(batch, heads, tokens, v.shape[3])
    tensors = (q, k, v, f_q, f_k)
    launch(
        kernels.hybrid_step,
        (kv_heads, batch),
        *tensors,
        s,
        z,
        ring_f if ring_k is None else ring_k,
        ring_f,
        ring_v,
        out,
        before,
        lengths,
        None if gain is None else gain.contiguous(),
        *(stride for t in tensors for stride in t.stride()[:3]),
        tokens,
        scale,
        **step_constants(heads // kv_heads, dim, f_k.shape[3], v.shape[3], ring_v.shape[2], q.dtype),
        MAP=feature_map,
        OWN_KEYS=ring_k is not None,
    )
    return out


hybrid_attention_triton_step = torch.library.custom_op(
    "attnzoo::hybrid_attention_triton_step", _step, mutates_args=("s", "z", "ring_k", "ring_f", "ring_v")
)


@hybrid_attention_triton_step.register_fake
def _(q, k, v, *rest):  # type: ignore[no-untyped-def]
    return v.new_empty(*q.shape[:3], v.shape[3])


def step_constants(group: int, dim: int, features: int, v_dim: int, slots: int, dtype: torch.dtype) -> dict[str, Any]:
    """Constants of the kernel that follow from sizes and dtype, and its launch options."""
    block_v, exact = power_of_two(v_dim), dtype == torch.float32
    most_features, most_keys = _EXACT if exact else (max(16, _SLAB // block_v), 64)
    if interpreted():
        most_features, most_keys = 16, 16
    return {
        "GROUP": group,
        "SLOTS": slots,
        "PIECES": not exact and not interpreted(),
        "D": dim,
        "F": features,
        "DV": v_dim,
        "BG": power_of_two(group),
        "BD": power_of_two(dim),
        "BF": min(power_of_two(features), most_features),
        "BV": block_v,
        "BN": min(power_of_two(max(slots, 1)), most_keys),
        "num_warps": _WARPS,
        "num_stages": _STAGES,
    }
