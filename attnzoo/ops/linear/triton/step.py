"""The operator of a step: a few new tokens over a state that is updated in place."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.launching import interpreted
from attnzoo.ops.linear.common import Call, State
from attnzoo.ops.linear.triton.launch import on_device_of, rows_contiguous
from attnzoo.ops.linear.triton.shapes import power_of_two

_SLAB = 16384  # elements of the state that a program holds at a time
_WARPS = 8


def step(call: Call, state: State) -> Tensor:
    """Output `[B, Hq, S, Dv]`; `state` is updated in place."""
    return linear_attention_triton_step(
        call.q, call.k, call.v, state.s, state.z, call.log_decay, call.key_lengths, call.feature_map, call.scale
    )


@torch.library.custom_op("attnzoo::linear_attention_triton_step", mutates_args=("s", "z"))
def linear_attention_triton_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    z: Tensor | None,
    log_decay: Tensor | None,
    lengths: Tensor | None,
    feature_map: str,
    scale: float,
) -> Tensor:
    """The output; `s` and `z` are written. Of row b's tokens the first `lengths[b]` are real, the others give 0."""
    from attnzoo.ops.linear.triton import kernels_step

    if s.stride(-1) != 1 or (z is not None and z.stride(-1) != 1):
        tidy = s.contiguous(), None if z is None else z.contiguous()
        out = _launch(q, k, v, *tidy, log_decay, lengths, feature_map, scale, kernels_step)
        s.copy_(tidy[0])
        if z is not None and tidy[1] is not None:
            z.copy_(tidy[1])
        return out
    return _launch(q, k, v, s, z, log_decay, lengths, feature_map, scale, kernels_step)


@linear_attention_triton_step.register_fake
def _(q, k, v, *rest):  # type: ignore[no-untyped-def]
    return v.new_empty(*q.shape[:3], v.shape[3])


def _launch(q, k, v, s, z, log_decay, lengths, feature_map, scale, kernels):  # type: ignore[no-untyped-def]
    q, k, v = (rows_contiguous(t) for t in (q, k, v))
    (batch, heads, tokens, dim), kv_heads, v_dim = q.shape, k.shape[1], v.shape[3]
    out = v.new_empty(batch, heads, tokens, v_dim)
    block_d = power_of_two(dim)
    block_v = 16 if interpreted() else min(power_of_two(v_dim), max(16, _SLAB // block_d))
    with on_device_of(q):
        kernels.step_state[(kv_heads, batch)](
            q,
            k,
            v,
            s,
            z,
            out,
            log_decay,
            lengths,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *s.stride()[:3],
            *((0, 0) if z is None else z.stride()[:2]),
            tokens,
            scale,
            GROUP=heads // kv_heads,
            MAP=feature_map,
            D=dim,
            DV=v_dim,
            BD=block_d,
            BV=block_v,
            num_warps=_WARPS,
        )
    return out
