"""Linear attention in chunks as an operator with a gradient, opaque to torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.eager import with_shortcut
from attnzoo.ops.launching import is_plain
from attnzoo.ops.linear.common import Call, State
from attnzoo.ops.linear.triton.backward import gradients
from attnzoo.ops.linear.triton.forward import attend
from attnzoo.ops.linear.triton.given import Given
from attnzoo.ops.linear.triton.launch import empty_like_heads
from attnzoo.ops.linear.triton.reasons import step_reasons
from attnzoo.ops.linear.triton.shapes import configure, cut
from attnzoo.ops.linear.triton.step import step


def run(call: Call) -> tuple[Tensor, State]:
    """Output `[B, Hq, Sq, Dv]` in the values' dtype, and the state after the last token."""
    if call.causal and call.initial is not None and not step_reasons(call):
        given = call.initial
        state = State(given.s.clone(), None if given.z is None else given.z.clone())
        return step(call, state), state
    s, z = call.initial or (None, None)
    out, _, new_s, new_z, _, _ = _attend(
        call.q,
        call.k,
        call.v,
        s,
        z,
        call.log_decay,
        call.key_lengths,
        call.cu_seqlens,
        call.feature_map,
        call.normalize,
        call.causal,
        call.scale,
    )
    return out, State(new_s, new_z if call.normalize else None)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor | None,
    z: Tensor | None,
    log_decay: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_map: str,
    normalize: bool,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, 1 / the normaliser `[B, Hq, Sq]`, the new state, the sums of the parts; what there is not is empty."""
    return attend(q, k, v, s, z, log_decay, key_lengths, cu_seqlens, feature_map, normalize, causal, scale)


def _differentiate(
    d_out: Tensor,
    d_s1: Tensor | None,
    d_z1: Tensor | None,
    out: Tensor,
    inverses: Tensor,
    s1: Tensor,
    z1: Tensor,
    sums: Tensor,
    z_sums: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor | None,
    z: Tensor | None,
    log_decay: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_map: str,
    normalize: bool,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the initial state; the last two are empty where there is none."""
    given = Given(
        d_out, d_s1, d_z1, out, inverses, s1, z1, sums, z_sums, q, k, v, s, z, log_decay, key_lengths, cu_seqlens
    )
    return gradients(given, feature_map, normalize, causal, scale)


linear_attention_triton = torch.library.custom_op("attnzoo::linear_attention_triton", _forward, mutates_args=())
linear_attention_triton_backward = torch.library.custom_op(
    "attnzoo::linear_attention_triton_backward", _differentiate, mutates_args=()
)


@linear_attention_triton.register_fake
def _(q, k, v, s, z, log_decay, key_lengths, cu_seqlens, feature_map, normalize, causal, scale):  # type: ignore[no-untyped-def]
    batch, kv_heads, length, dim = k.shape
    states = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = {"dtype": torch.float32, "device": k.device}
    sums = z_sums = torch.empty(0, **wide)
    if causal:
        config = configure(dim, v.shape[3], q.dtype, v.dtype)
        parts = cut(batch, kv_heads, length, config, k.device, cu_seqlens)
        if parts.several:
            sums = torch.empty(parts.programs, kv_heads, dim, v.shape[3], **wide)
            z_sums = torch.empty(parts.programs, kv_heads, dim, **wide) if normalize else z_sums
    return (
        empty_like_heads(q, v.shape[3], v.dtype),
        torch.empty(q.shape[:3] if normalize else 0, **wide),
        torch.empty(states, kv_heads, dim, v.shape[3], **wide),
        torch.empty((states, kv_heads, dim) if normalize else 0, **wide),
        sums,
        torch.empty_like(z_sums),
    )


@linear_attention_triton_backward.register_fake
def _(d_out, d_s1, d_z1, out, inverses, s1, z1, sums, z_sums, q, k, v, s, z, *rest):  # type: ignore[no-untyped-def]
    d_s = inverses.new_empty(0 if s is None else s.shape)
    d_z = inverses.new_empty(0 if z is None else z.shape)
    return *(empty_like_heads(t, t.shape[3], t.dtype) for t in (q, k, v)), d_s, d_z


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:8])
    ctx.rest = inputs[8:]


def _backward(ctx, d_out, d_inverses, d_s, d_z, *_):  # type: ignore[no-untyped-def]
    out, *saved = ctx.saved_tensors
    s, z = saved[8:10]
    d_out = torch.zeros_like(out) if d_out is None else d_out
    if d_s is None and d_z is not None:
        d_s = torch.zeros_like(saved[1])
    if d_z is None and d_s is not None and z is not None:
        d_z = torch.zeros_like(saved[2])
    differentiate = _differentiate if is_plain(d_out) else linear_attention_triton_backward
    d_q, d_k, d_v, d_s0, d_z0 = differentiate(d_out, d_s, d_z, out, *saved, *ctx.rest)
    return d_q, d_k, d_v, None if s is None else d_s0, None if z is None else d_z0, *([None] * 7)


linear_attention_triton.register_autograd(_backward, setup_context=_save)
_attend = with_shortcut(linear_attention_triton, _forward, _save, _backward)
