"""Attention written out, one query head at a time, for weights of either kind."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.conversion.families import Projections
from attnzoo.conversion.latent import LatentWeights


def projections(heads, kv_heads, head_dim, dim, *, biases=False, seed=0) -> Projections:
    """Random weights in fp64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    parts = {
        "q": 2 * draw(heads, head_dim, dim),
        "k": 2 * draw(kv_heads, head_dim, dim),
        "v": draw(kv_heads, head_dim, dim),
        "o": draw(dim, heads, head_dim),
    }
    if biases:
        parts |= {"q_bias": draw(heads, head_dim), "k_bias": 3 * draw(kv_heads, head_dim)}
        parts |= {"v_bias": draw(kv_heads, head_dim), "o_bias": draw(dim)}
    return Projections(**parts)


def rotated(x: Tensor, frequencies: Tensor) -> Tensor:
    """x `[S, D]`, its leading dimensions rotated in halves."""
    half = len(frequencies)
    out = x.clone()
    for position in range(len(x)):
        for f in range(half):
            angle = position * frequencies[f]
            a, b = x[position, f], x[position, f + half]
            out[position, f] = a * angle.cos() - b * angle.sin()
            out[position, f + half] = b * angle.cos() + a * angle.sin()
    return out


def shares(q: Tensor, k: Tensor, scale: float) -> Tensor:
    hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return (scale * q @ k.T).masked_fill(hidden, float("-inf")).softmax(-1)


def grouped(p: Projections, x: Tensor, frequencies: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Outputs `[S, dim]` and the attention of each head `[H, S, S]`."""
    group = len(p.q) // len(p.k)
    out, every = torch.zeros_like(x), []
    for h in range(len(p.q)):
        q, k, v = x @ p.q[h].T, x @ p.k[h // group].T, x @ p.v[h // group].T
        if p.q_bias is not None:
            q, k, v = q + p.q_bias[h], k + p.k_bias[h // group], v + p.v_bias[h // group]
        every.append(shares(rotated(q, frequencies), rotated(k, frequencies), scale))
        out += every[-1] @ v @ p.o[:, h].T
    return out if p.o_bias is None else out + p.o_bias, torch.stack(every)


def latent(w: LatentWeights, x: Tensor, heads: int, nope: int, frequencies: Tensor, scale: float) -> Tensor:
    """Outputs `[S, dim]`; frequencies of each rope plane."""
    rope = 2 * len(frequencies)
    rank = w.kv_down.shape[0] - rope
    low = x @ w.kv_down.T + (0 if w.kv_down_bias is None else w.kv_down_bias)
    q_all = (x if w.q_down is None else x @ w.q_down.T) @ w.q.T + (0 if w.q_bias is None else w.q_bias)
    up = (low[:, :rank] @ w.kv_up.T).unflatten(1, (heads, -1))
    q_all, o = q_all.unflatten(1, (heads, -1)), w.o.unflatten(1, (heads, -1))
    out = torch.zeros_like(x)
    for h in range(heads):
        q = torch.cat([q_all[:, h, :nope], rotated(q_all[:, h, nope:], frequencies)], dim=1)
        k = torch.cat([up[:, h, :nope], rotated(low[:, rank:], frequencies)], dim=1)
        out += shares(q, k, scale) @ up[:, h, nope:] @ o[:, h].T
    return out if w.o_bias is None else out + w.o_bias
