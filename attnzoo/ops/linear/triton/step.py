"""The operator of a step: a few new tokens over a state that is updated in place."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.launching import interpreted, is_plain
from attnzoo.ops.linear.common import Call, State
from attnzoo.ops.linear.triton.launch import launch, rows_contiguous
from attnzoo.ops.linear.triton.shapes import compute_dtype, power_of_two

_SLAB = (16384, 8192)  # elements of the state that a program holds at a time, of one token and of several
_WARPS, _STAGES = 4, 3


def step(call: Call, state: State) -> Tensor:
    """Output `[B, Hq, S, Dv]`; `state` is updated in place."""
    run = _step if is_plain(call.q) else linear_attention_triton_step
    return run(call.q, call.k, call.v, state.s, state.z, call.log_decay, call.key_lengths, call.feature_map, call.scale)


def _step(
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


linear_attention_triton_step = torch.library.custom_op(
    "attnzoo::linear_attention_triton_step", _step, mutates_args=("s", "z")
)


@linear_attention_triton_step.register_fake
def _(q, k, v, *rest):  # type: ignore[no-untyped-def]
    return v.new_empty(*q.shape[:3], v.shape[3])


def _launch(q, k, v, s, z, log_decay, lengths, feature_map, scale, kernels):  # type: ignore[no-untyped-def]
    q, k, v = (rows_contiguous(t) for t in (q, k, v))
    (batch, heads, tokens, dim), kv_heads, v_dim = q.shape, k.shape[1], v.shape[3]
    out = v.new_empty(batch, heads, tokens, v_dim)
    pieces = compute_dtype(q.dtype, v.dtype)[0] == torch.bfloat16
    least = 64 if tokens > 1 and pieces else 16  # as in `configure`
    block_d = power_of_two(dim, least)
    block_v = 16 if interpreted() else min(power_of_two(v_dim, least), max(least, _SLAB[tokens > 1] // block_d))
    options = {"GROUP": heads // kv_heads, "MAP": feature_map, "D": dim, "DV": v_dim, "BD": block_d, "BV": block_v}
    sizes: tuple[float, ...] = (scale,)
    if tokens > 1:
        options |= {"CHUNK": 16, "PIECES": pieces}
        sizes = (tokens, scale)
    kernel = kernels.step_tokens if tokens > 1 else kernels.step_token
    launch(
        kernel,
        (kv_heads, batch),
        q,
        k,
        v,
        s,
        z,
        out,
        log_decay,
        lengths,
        *(stride for t in (q, k, v) for stride in t.stride()[: 3 if tokens > 1 else 2]),
        *s.stride()[:3],
        *((0, 0) if z is None else z.stride()[:2]),
        *sizes,
        **options,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    return out
