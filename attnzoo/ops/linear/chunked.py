"""Linear attention a chunk of tokens at a time, in plain PyTorch: time and memory linear in sequence length.

Within a chunk the weights are written out; what came before is read from the state (arXiv 2307.08621, 2312.06635). The
normaliser is one more column of the values, all ones. The backward makes two sweeps and keeps one state: queries'
gradients from the state going forward again, keys' and values' from the state's gradient going back. One operator each
way, opaque to torch.compile, so that boundaries may be read from tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.linear.common import Call, State, empty_state, inverse_or_zero
from attnzoo.ops.linear.sweeps import Inputs, read_all, read_causal, unread_all, unread_causal
from attnzoo.ops.softmax.common import accumulation_dtype

CHUNK = 64


def reasons(call: Call) -> list[str]:
    """Why this backend cannot run the call: never."""
    return []


def run(call: Call) -> tuple[Tensor, State]:
    """Output `[B, Hq, Sq, Dv]` in the values' dtype, and the state after the last token."""
    s, z = call.initial or empty_state(call, accumulation_dtype(call.k.dtype))
    out, _, s, new_z = linear_attention_chunks(
        call.q,
        call.k,
        call.v,
        s,
        z,
        call.log_decay,
        call.key_lengths,
        call.cu_seqlens,
        call.feature_map,
        call.causal,
        call.scale,
        CHUNK,
    )
    return out, State(s, new_z if call.normalize else None)


@torch.library.custom_op("attnzoo::linear_attention_chunks", mutates_args=())
def linear_attention_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    z: Tensor | None,
    log_decay: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_map: str,
    causal: bool,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, normaliser `[B, Hq, Sq]` and the new state; the normaliser and its state are empty where z is None."""
    x = Inputs(q, k, v, log_decay, key_lengths, cu_seqlens, feature_map, causal, scale, z is not None, chunk)
    with torch.autocast(q.device.type, enabled=False):
        state = _join(s, z)
        out = state.new_zeros(*q.shape[:3], v.shape[3] + x.normalize)
        for span in x.spans():
            (read_causal if causal else read_all)(x, span, state, out)
        if not x.normalize:
            return out.to(v.dtype), out.new_empty(0), state, out.new_empty(0)
        out, total = out[..., :-1] * inverse_or_zero(out[..., -1:]), out[..., -1].clone()
        return out.to(v.dtype), total, state[..., :-1].contiguous(), state[..., -1].clone()


@torch.library.custom_op("attnzoo::linear_attention_chunks_backward", mutates_args=())
def linear_attention_chunks_backward(
    d_out: Tensor,
    d_s: Tensor,
    d_z: Tensor,
    out: Tensor,
    total: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    z: Tensor | None,
    log_decay: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_map: str,
    causal: bool,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the initial state."""
    x = Inputs(q, k, v, log_decay, key_lengths, cu_seqlens, feature_map, causal, scale, z is not None, chunk)
    dtype = accumulation_dtype(k.dtype)
    with torch.autocast(q.device.type, enabled=False):
        state, d_state = _join(s, z), _join(d_s, d_z if x.normalize else None)
        d_read = d_out.to(dtype)
        if x.normalize:
            inverse = inverse_or_zero(total)[..., None]
            d_total = -(d_read * out).sum(-1, keepdim=True) * inverse
            d_read = torch.cat([d_read * inverse, d_total], dim=-1)
        d_q, d_k, d_v = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        for span in x.spans():
            (unread_causal if causal else unread_all)(x, span, state, d_state, d_read, d_q, d_k, d_v)
        if not x.normalize:
            return d_q, d_k, d_v, d_state.to(s.dtype), d_state.new_empty(0)
        return d_q, d_k, d_v, d_state[..., :-1].to(s.dtype).contiguous(), d_state[..., -1].clone()


def _join(s: Tensor, z: Tensor | None) -> Tensor:
    """A copy of the state in which the normaliser is one more column."""
    return s.clone() if z is None else torch.cat([s, z[..., None]], dim=-1)


@linear_attention_chunks.register_fake
def _(q, k, v, s, z, *rest):  # type: ignore[no-untyped-def]
    total = s.new_empty(0) if z is None else s.new_empty(q.shape[:3])
    out = q.new_empty(*q.shape[:3], v.shape[3], dtype=v.dtype)
    return out, total, s.new_empty(s.shape), s.new_empty(0 if z is None else z.shape)


@linear_attention_chunks_backward.register_fake
def _(d_out, d_s, d_z, out, total, q, k, v, s, z, *rest):  # type: ignore[no-untyped-def]
    d_z = s.new_empty(0 if z is None else z.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), s.new_empty(s.shape), d_z


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*output[:2], *inputs[:8])
    ctx.rest = inputs[8:]


def _backward(ctx, d_out, d_total, d_s, d_z):  # type: ignore[no-untyped-def]
    out, total, *inputs = ctx.saved_tensors
    z = inputs[4]
    d_q, d_k, d_v, d_s0, d_z0 = linear_attention_chunks_backward(d_out, d_s, d_z, out, total, *inputs, *ctx.rest)
    return d_q, d_k, d_v, d_s0, None if z is None else d_z0, *([None] * 7)


linear_attention_chunks.register_autograd(_backward, setup_context=_save)
