"""A few new tokens of softmax near and linear attention far, over a state and a ring that are written in place."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.launching import interpreted
from attnzoo.ops.linear.checks import check_dtypes, check_map, check_tensors
from attnzoo.ops.linear.common import State, apply_map, inverse_or_zero
from attnzoo.ops.linear.hybrid import near_weights
from attnzoo.ops.linear.tail import Ring, Tail, tail_of, take_in
from attnzoo.ops.linear.triton.hybrid_step import hybrid_step as fused
from attnzoo.ops.linear.triton.hybrid_step import hybrid_step_reasons
from attnzoo.ops.linear.triton.reasons import MOST_TOKENS
from attnzoo.ops.softmax.common import accumulation_dtype


def hybrid_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    ring: Ring,
    before: Tensor,
    *,
    q_features: Tensor | None = None,
    k_features: Tensor | None = None,
    feature_map: str = "elu",
    near_weight: Tensor | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`hybrid_attention` of at most 16 new tokens; those that leave the window enter the state, in place. No gradient.

    Everything happens on the device: a CUDA graph can hold it.

    Args:
        q, k, v, q_features, k_features, feature_map, near_weight, scale: as of `hybrid_attention`.
        state: of all tokens that the ring does not hold, with its normaliser; fp32 (fp64 for fp64).
        ring: the last `window - 1` tokens. Without keys of its own, the features are the keys.
        before: how many tokens each row has, `[B]` int64 or int32.
        lengths: `[B]`, how many of each row's new tokens are real; the others change nothing and give 0.
        backend: "auto", "triton" (one kernel) or "plain" (PyTorch).

    Returns:
        `[B, Hq, S, Dv]` in the values' dtype.

    Raises:
        ValueError: for tensors that do not fit, or if the kernel is named and cannot run the call; nothing has been
            written then.
    """
    if backend not in ("auto", "triton", "plain"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'plain', got {backend!r}")
    f_q, f_k = q if q_features is None else q_features, k if k_features is None else k_features
    check_map(feature_map)
    for one, other in ((q, k), (f_q, f_k)):
        check_tensors(one, other, v)
        check_dtypes(one, other, v)
    _check_memory(k, f_k, v, state, ring, before)
    if not 1 <= q.shape[2] <= MOST_TOKENS or q.shape[2] != k.shape[2]:
        raise ValueError(f"q and k must be of 1 to {MOST_TOKENS} tokens, got {q.shape[2]} and {k.shape[2]}")
    if near_weight is not None and near_weight.shape != q.shape[1:2]:
        raise ValueError(f"near_weight must be [{q.shape[1]}], got {list(near_weight.shape)}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, f_q, f_k)):
        raise ValueError("hybrid_step has no gradient")
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if backend == "triton" and (why := hybrid_step_reasons(q, f_q, f_k, v, state, ring)):
        raise ValueError(f"hybrid_step cannot run this call: {'; '.join(why)}")
    if backend == "triton" or (backend == "auto" and takes_kernel(q, f_q, f_k, v, state, ring)):
        return fused(q, k, v, f_q, f_k, state, ring, before, lengths, near_weight, feature_map, factor)
    tail = tail_of(ring, before, before.clamp(max=ring.size))
    with torch.autocast(q.device.type, enabled=False):
        settings = feature_map, None, ring.size + 1
        out = from_tail(q, k, f_q, f_k, v, tail, state, *settings, near_weight, factor, lengths)
        counts = torch.full_like(before, q.shape[2]) if lengths is None else lengths
        after = take_in(ring, tail, state, (k, f_k, v), before, counts, feature_map, None)
    for memory, new in zip(state, after, strict=True):
        if memory is not None and new is not None:
            memory.copy_(new)
    return out


def takes_kernel(q: Tensor, f_q: Tensor, f_k: Tensor, v: Tensor, state: State, ring: Ring) -> bool:
    """Whether the kernel is the way to step; the interpreter never is."""
    return q.device.type == "cuda" and not interpreted() and not hybrid_step_reasons(q, f_q, f_k, v, state, ring)


def from_tail(
    q: Tensor,
    k: Tensor,
    f_q: Tensor,
    f_k: Tensor,
    v: Tensor,
    tail: Tail,
    state: State,
    feature_map: str,
    log_decay: Tensor | None,
    window: int | None,
    near_weight: Tensor | None,
    scale: float | None,
    lengths: Tensor | None,
) -> Tensor:
    """A few queries over the state, the tail and themselves, with weights written out."""
    dtype = accumulation_dtype(f_k.dtype)
    heads, new, held, device = k.shape[1], q.shape[2], tail.v.shape[2], q.device
    t, slot = torch.arange(new, device=device), torch.arange(held + new, device=device)
    live = slot >= held - tail.alive[:, None]  # [B, T + S]
    if lengths is not None:
        live = live & (slot < held + lengths[:, None])
    age = held + t[:, None] - slot  # [S, T + S]
    seen = live[:, None, None, None] & (age >= 0)  # [B, 1, 1, S, T + S]

    real_q, real_k = live[:, None, held:, None], live[:, None, :, None]
    f_q = apply_map(feature_map, f_q.to(dtype).masked_fill(~real_q, 0)).unflatten(1, (heads, -1))
    f_k = torch.cat([tail.features.to(dtype), f_k.to(dtype)], dim=2).masked_fill(~real_k, 0)
    f_k = apply_map(feature_map, f_k)
    v_all = torch.cat([tail.v.to(dtype), v.to(dtype)], dim=2).masked_fill(~real_k, 0)
    joint = state.s
    if state.z is not None:
        joint = torch.cat([state.s, state.z[..., None]], dim=-1)
        v_all = torch.cat([v_all, torch.ones_like(v_all[..., :1])], dim=-1)

    weights = f_q @ f_k[:, :, None].mT * (seen if window is None else seen & (age >= window))
    carried = f_q @ joint[:, :, None]
    if log_decay is not None:
        log_decay = log_decay.to(dtype)[:, None, None, None]  # [Hk, 1, 1, 1]
        weights = weights * torch.exp(log_decay * age.clamp(min=0))
        since = tail.alive[:, None, None, None, None] + 1 + t[:, None]  # [B, 1, 1, S, 1]
        carried = carried * torch.exp(log_decay * since)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if window is not None:
        near_q = q.to(dtype).masked_fill(~real_q, 0).unflatten(1, (heads, -1)) * factor
        near_k = torch.cat([tail.keys.to(dtype), k.to(dtype)], dim=2).masked_fill(~real_k, 0)
        gain = q.new_ones(q.shape[1]) if near_weight is None else near_weight
        gain = gain.to(dtype).reshape(heads, -1, 1, 1)
        weights = weights + near_weights(near_q @ near_k[:, :, None].mT, seen & (age < window), gain)
    out = weights @ v_all[:, :, None] + carried  # [B, Hk, G, S, Dv (+ 1)]
    out = out * factor if state.z is None else out[..., :-1] * inverse_or_zero(out[..., -1:])
    return out.flatten(1, 2).masked_fill(~real_q, 0).to(v.dtype)


def _check_memory(k: Tensor, f_k: Tensor, v: Tensor, state: State, ring: Ring, before: Tensor) -> None:
    """ValueError unless state, ring and lengths are those of such tokens."""
    batch, heads, _, features = f_k.shape
    wide = accumulation_dtype(v.dtype)
    keys = (
        [] if ring.keys is None else [("keys of the ring", ring.keys, (batch, heads, ring.size, k.shape[3]), k.dtype)]
    )
    for name, t, shape, dtype in (
        ("s of the state", state.s, (batch, heads, features, v.shape[3]), wide),
        ("z of the state", state.z, (batch, heads, features), wide),
        ("features of the ring", ring.features, (batch, heads, ring.size, features), f_k.dtype),
        ("v of the ring", ring.v, (batch, heads, ring.size, v.shape[3]), v.dtype),
        *keys,
    ):
        if t is None or t.shape != shape or t.dtype != dtype or t.device != v.device:
            given = "None" if t is None else f"{list(t.shape)} {t.dtype} on {t.device}"
            raise ValueError(f"{name} must be {list(shape)} {dtype} on {v.device}, got {given}")
    if ring.keys is None and k.shape[3] != features:
        raise ValueError(f"the ring needs keys: those of the window have size {k.shape[3]}, the features {features}")
    if before.shape != (batch,) or before.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"before must be int32 or int64 [{batch}], got {before.dtype} {list(before.shape)}")
