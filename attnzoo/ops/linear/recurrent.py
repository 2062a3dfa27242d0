"""Linear attention one token after another, with a state that is updated in place: O(1) a token (arXiv 2006.16236).

S <- decay * S + map(k) v^T        z <- decay * z + map(k)        out = scale * map(q) S / (scale * map(q) . z)
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.linear.common import Call, State, apply_map, empty_state, inverse_or_zero
from attnzoo.ops.softmax.common import accumulation_dtype


def reasons(call: Call) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    out = []
    if not call.causal:
        out.append("is causal")
    if call.cu_seqlens is not None:
        out.append("takes no packed documents")
    tensors = (call.q, call.k, call.v, *(call.initial or ()))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out.append("has no gradient")
    return out


def run(call: Call) -> tuple[Tensor, State]:
    """Output `[B, Hq, S, Dv]` in the values' dtype, and the state after the last token; the initial one stays."""
    initial = call.initial or empty_state(call, accumulation_dtype(call.k.dtype))
    state = State(initial.s.clone(), None if initial.z is None else initial.z.clone())
    return step(call, state), state


def step(call: Call, state: State) -> Tensor:
    """As `run`, but `state` is updated in place."""
    return linear_attention_step(
        call.q, call.k, call.v, state.s, state.z, call.log_decay, call.key_lengths, call.feature_map, call.scale
    )


@torch.library.custom_op("attnzoo::linear_attention_step", mutates_args=("s", "z"))
def linear_attention_step(
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
    dtype = s.dtype
    out = v.new_zeros(*q.shape[:3], v.shape[3])
    decay = None if log_decay is None else torch.exp(log_decay.to(dtype))[:, None]  # [Hk, 1]
    for t in range(q.shape[2]):
        q_t, k_t = (apply_map(feature_map, x[:, :, t].to(dtype)) for x in (q, k))
        v_t, fade = v[:, :, t].to(dtype), decay
        if lengths is not None:
            real = (t < lengths)[:, None, None]  # [B, 1, 1]
            q_t, k_t, v_t = (x.masked_fill(~real, 0) for x in (q_t, k_t, v_t))
            fade = None if decay is None else torch.where(real, decay, 1)
        if fade is not None:
            s.mul_(fade[..., None])
        s.addcmul_(k_t[..., None], v_t[..., None, :])
        q_t = q_t.unflatten(1, (k.shape[1], -1)) * scale  # [B, Hk, G, D]
        read = q_t @ s
        if z is not None:
            if fade is not None:
                z.mul_(fade)
            z.add_(k_t)
            read = read * inverse_or_zero(q_t @ z[..., None])
        out[:, :, t] = read.flatten(1, 2).to(v.dtype)
    return out


@linear_attention_step.register_fake
def _(q, k, v, *rest):  # type: ignore[no-untyped-def]
    return v.new_empty(*q.shape[:3], v.shape[3])
