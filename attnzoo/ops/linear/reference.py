"""Linear attention in its parallel form, S x S weights and all: the truth that other backends are held to.

Weights scale * decay^(i - j) * map(q_i) . map(k_j) of the visible keys (arXiv 2006.16236, 2307.08621), divided by their
sum with the normaliser. Quadratic in memory, differentiable by autograd, right in fp64; it runs only when asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.linear.common import Call, State, apply_map, empty_state, inverse_or_zero
from attnzoo.ops.softmax.common import accumulation_dtype


def reasons(call: Call) -> list[str]:
    """Why this backend cannot run the call: never."""
    return []


def run(call: Call) -> tuple[Tensor, State]:
    """Output `[B, Hq, Sq, Dv]` in the values' dtype, and the state after the last token."""
    with torch.autocast(call.q.device.type, enabled=False):
        return _run(call)


def _run(call: Call) -> tuple[Tensor, State]:
    dtype = accumulation_dtype(call.k.dtype)
    q_member, k_member, place, lengths = _sequences(call)
    # Whatever stands in padding, NaN included, must not reach a sum, forward or backward.
    q_live, k_live = (member.any(1)[:, None, :, None] for member in (q_member, k_member))
    k = apply_map(call.feature_map, call.k.to(dtype).masked_fill(~k_live, 0)).masked_fill(~k_live, 0)
    v = call.v.to(dtype).masked_fill(~k_live, 0)
    q = apply_map(call.feature_map, call.q.to(dtype).masked_fill(~q_live, 0)).masked_fill(~q_live, 0)
    q = q.unflatten(1, (call.k.shape[1], call.group)) * call.scale  # [B, Hk, G, Sq, D]
    if call.normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)

    visible = (q_member.to(dtype).mT @ k_member.to(dtype)).bool()  # [B, Sq, Sk]: of one sequence
    log_decay = place.new_zeros(call.k.shape[1], dtype=dtype)  # [Hk]
    if call.log_decay is not None:
        log_decay = call.log_decay.to(dtype)
    ages = place.new_zeros(1, 1)
    if call.causal:
        ages = place[:, None] - place
        visible = visible & (ages >= 0)
    weights = torch.exp(log_decay[:, None, None] * ages.clamp(min=0)) * visible[:, None]  # [B, Hk, Sq, Sk]
    out = ((q @ k[:, :, None].mT) * weights[:, :, None]) @ v[:, :, None]

    s, z = call.initial or empty_state(call, dtype)
    joint = s if z is None else torch.cat([s, z[..., None]], dim=-1)  # [N, Hk, D, Dv (+ 1)]
    joint = joint.to(dtype)
    age = (place + 1)[:, None] if call.causal else place.new_zeros(1, 1)
    since_start = torch.exp(log_decay[:, None, None] * age)  # [Hk, Sq | 1, 1]
    out = out + since_start[:, None] * torch.einsum("bni,bhgid,nhde->bhgie", q_member.to(dtype), q, joint)

    left = (lengths[:, None] - 1 - place).clamp(min=0) if call.causal else lengths.new_zeros(1, 1)  # [N, Sk]
    fade = torch.exp(log_decay[:, None] * left[:, None])  # [N, Hk, Sk]
    whole = torch.exp(log_decay * (lengths[:, None] if call.causal else 0))  # [N, Hk]
    joint = whole[..., None, None] * joint + torch.einsum("bnj,nhj,bhjd,bhje->nhde", k_member.to(dtype), fade, k, v)
    state = State(joint[..., :-1], joint[..., -1]) if call.normalize else State(joint, None)
    if call.normalize:
        out = out[..., :-1] * inverse_or_zero(out[..., -1:])
    return out.flatten(1, 2).to(call.v.dtype), state


def _sequences(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which sequence each query and key belongs to, bool `[B, N, S]`; each key's place in it `[Sk]`; lengths `[N]`."""
    (batch, _, q_len, _), k_len, device = call.q.shape, call.k.shape[2], call.q.device
    place = torch.arange(k_len, device=device)
    if call.cu_seqlens is not None:
        starts, ends = call.cu_seqlens[:-1].long(), call.cu_seqlens[1:].long()
        member = ((place >= starts[:, None]) & (place < ends[:, None]))[None]  # [1, N, S]
        return member, member, place - (member[0] * starts[:, None]).sum(0), ends - starts
    own = torch.eye(batch, dtype=torch.bool, device=device)[..., None]
    lengths = torch.full((batch,), k_len, device=device) if call.key_lengths is None else call.key_lengths.long()
    k_member = own & (place < lengths[:, None])[:, None]
    return (k_member if call.causal else own.expand(-1, -1, q_len)), k_member, place, lengths
