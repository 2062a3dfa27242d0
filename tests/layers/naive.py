"""The layer as a person would compute it on paper: one sequence, head by head, rotation by complex numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.layers import GroupedQueryAttention


def naive_layer(
    layer: GroupedQueryAttention,
    x: Tensor,
    *,
    context: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """What `layer` gives for one sequence `x [S, dim]`, with keys from `context [Sc, dim]` if there is one."""
    source = x if context is None else context
    size, group = layer.head_dim, layer.num_heads // layer.num_kv_heads
    q, k, v = (
        source_ @ projection.weight.T + (0 if projection.bias is None else projection.bias)
        for source_, projection in ((x, layer.q_proj), (source, layer.k_proj), (source, layer.v_proj))
    )
    at = torch.arange(len(x)) if positions is None else positions
    heads = []
    for h in range(layer.num_heads):
        mine = slice(h * size, (h + 1) * size)
        theirs = slice(h // group * size, (h // group + 1) * size)
        q_h, k_h, v_h = q[:, mine], k[:, theirs], v[:, theirs]
        if layer.q_norm is not None and layer.k_norm is not None:
            q_h, k_h = naive_norm(q_h, layer.q_norm.weight), naive_norm(k_h, layer.k_norm.weight)
        if layer.rope is not None and context is None:
            q_h, k_h = (rotate(t, at, layer.rope.base, layer.rope.rotary_dim, layer.rope.layout) for t in (q_h, k_h))
        scores = q_h @ k_h.T * (size**-0.5 if layer.scale is None else layer.scale)
        if layer.softcap is not None:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        if context is None and layer.mask is not None:
            i, j = torch.arange(len(x))[:, None], torch.arange(len(x))[None, :]
            scores = scores.masked_fill(~layer.mask.head(h).visible(i, j), -torch.inf)
        heads.append(torch.softmax(scores, dim=-1) @ v_h)
    return torch.cat(heads, dim=-1) @ layer.o_proj.weight.T + (0 if layer.o_proj.bias is None else layer.o_proj.bias)


def naive_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotate(x: Tensor, positions: Tensor, base: float, rotary_dim: int, layout: str) -> Tensor:
    """Multiply pairs of dimensions, as complex numbers, by e^(i * position * frequency); `x [S, D]` in fp64."""
    half = rotary_dim // 2
    frequency = torch.tensor([base ** (-2 * n / rotary_dim) for n in range(half)], dtype=torch.float64)
    turn = torch.exp(1j * positions[:, None] * frequency)
    if layout == "half":
        pairs = torch.complex(x[:, :half], x[:, half:rotary_dim]) * turn
        return torch.cat([pairs.real, pairs.imag, x[:, rotary_dim:]], dim=-1)
    pairs = torch.complex(x[:, 0:rotary_dim:2], x[:, 1:rotary_dim:2]) * turn
    return torch.cat([torch.view_as_real(pairs).flatten(-2), x[:, rotary_dim:]], dim=-1)
