"""Random calls of linear attention, and the loops that they are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.linear import State
from tests.ops.naive_linear import token_by_token


def draw(
    q_heads: int,
    k_heads: int,
    length: int,
    dim: int,
    v_dim: int,
    batch: int = 2,
    k_len: int | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Random q, k and v in fp64 that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    k_len = length if k_len is None else k_len
    shapes = ((q_heads, length, dim), (k_heads, k_len, dim), (k_heads, k_len, v_dim))
    return [torch.randn(batch, *s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def draw_state(count: int, heads: int, dim: int, v_dim: int, normalize: bool = True) -> State:
    """Sums that features above 0 may leave."""
    generator = torch.Generator().manual_seed(7)
    s = torch.rand(count, heads, dim, v_dim, generator=generator, dtype=torch.float64).requires_grad_()
    z = torch.rand(count, heads, dim, generator=generator, dtype=torch.float64).add(1).detach().requires_grad_()
    return State(s, z if normalize else None)


def gradients(outputs: Any, inputs: Any) -> list[Tensor]:
    """Gradients of a fixed random sum of all outputs."""
    generator = torch.Generator().manual_seed(1)
    total = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs if o is not None)
    return list(torch.autograd.grad(total, [i for i in inputs if i is not None], retain_graph=True))


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def in_loop(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], state: State | None, **options: Any) -> list[Tensor]:
    """Each row's tokens alone; padding gives 0."""
    rows = []
    for b, n in enumerate(lengths):
        held = None if state is None else (state.s[b], torch.zeros_like(state.s[b, ..., 0]))
        if state is not None and state.z is not None:
            held = (state.s[b], state.z[b])
        out, s, z = token_by_token(q[b, :, :n], k[b, :, :n], v[b, :, :n], state=held, **options)
        rows.append((torch.nn.functional.pad(out, (0, 0, 0, q.shape[2] - n)), s, z))
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]
