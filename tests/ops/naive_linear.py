"""Linear and hybrid attention as one would explain them: a token, a head and a sum at a time, by no code of ours."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAPS = {
    "identity": lambda x: x,
    "elu": lambda x: torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0))),
    "relu": lambda x: x.clamp(min=0),
}


def token_by_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str = "elu",
    normalize: bool = True,
    decay: list[float] | None = None,
    scale: float | None = None,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence of naive_recurrent_simple_gla and naive_recurrent_linear_attn in flash-linear-attention, for one
    row `q [Hq, S, D]`, `k [Hk, S, D]`, `v [Hk, S, Dv]`, with the normaliser's sum beside it."""
    group, scale = q.shape[0] // k.shape[0], q.shape[-1] ** -0.5 if scale is None else scale
    outs, sums, totals = [], [], []
    for h in range(q.shape[0]):
        q_h, k_h, v_h = MAPS[feature_map](q[h]), MAPS[feature_map](k[h // group]), v[h // group]
        s = torch.zeros(k.shape[2], v.shape[2], dtype=q.dtype) if state is None else state[0][h // group]
        z = torch.zeros(k.shape[2], dtype=q.dtype) if state is None else state[1][h // group]
        for t in range(q.shape[1]):
            left = 1.0 if decay is None else decay[h // group]
            s = left * s + torch.outer(k_h[t], v_h[t])
            z = left * z + k_h[t]
            out = scale * q_h[t] @ s
            if normalize:
                total = scale * q_h[t] @ z
                out = torch.zeros_like(out) if total == 0 else out / total
            outs.append(out)
        sums.append(s)
        totals.append(z)
    out = torch.stack(outs).reshape(*q.shape[:2], -1) if outs else q.new_zeros(*q.shape[:2], v.shape[2])
    return out, torch.stack(sums[::group]), torch.stack(totals[::group])


def all_to_all(q: Tensor, k: Tensor, v: Tensor, feature_map: str, normalize: bool, scale: float) -> Tensor:
    """Every query of one row against every key."""
    group, outs = q.shape[0] // k.shape[0], []
    for h in range(q.shape[0]):
        weights = MAPS[feature_map](q[h]) @ MAPS[feature_map](k[h // group]).T
        weights = weights / weights.sum(-1, keepdim=True) if normalize else weights * scale
        outs.append(weights @ v[h // group])
    return torch.stack(outs)


def near_and_far(
    q: Tensor, k: Tensor, v: Tensor, f_q: Tensor, f_k: Tensor, window: int, gain: Tensor | None = None
) -> Tensor:
    """LoLCATs' equation for one row, query by query; `f_q` and `f_k` are features."""
    group, outs = q.shape[0] // k.shape[0], []
    for h in range(q.shape[0]):
        for i in range(q.shape[1]):
            first = max(0, i - window + 1)
            scores = k[h // group, first : i + 1] @ q[h, i] / math.sqrt(q.shape[2])
            near = torch.exp(scores - scores.max()) * (1 if gain is None else gain[h])
            far = f_k[h // group, :first] @ f_q[h, i]
            weights = torch.cat([far, near])
            outs.append(weights @ v[h // group, : i + 1] / weights.sum())
    return torch.stack(outs).reshape(*q.shape[:2], -1)
