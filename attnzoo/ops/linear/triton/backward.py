"""The backward's launches: sums of parts where a sequence has several, then the gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnzoo.ops.linear.triton import centre
from attnzoo.ops.linear.triton.forward import join
from attnzoo.ops.linear.triton.given import Given
from attnzoo.ops.linear.triton.launch import (
    blocks,
    constants,
    empty_like_heads,
    launch,
    strides,
)
from attnzoo.ops.linear.triton.shapes import Config, Parts, Tiles, configure, cut, is_full

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
States = tuple[Tensor | None, ...]  # s and z, and the sums of the parts of both


class Walk(NamedTuple):
    """What the kernels of a backward have in common."""

    config: Config
    feature_map: str
    normalize: bool
    causal: bool
    scale: float

    def constants(self, tiles: Tiles, length: int, x: Given, **more: Any) -> dict[str, Any]:
        """Constants and launch options of a walk over so many tokens."""
        full = is_full(length, self.config, x.lengths, x.cu_seqlens)
        return constants(self.config, tiles, self.normalize, self.feature_map, CAUSAL=self.causal, FULL=full, **more)


def gradients(given: Given, feature_map: str, normalize: bool, causal: bool, scale: float) -> Gradients:
    """Gradients of q, k, v and the initial state."""
    x = given.tidy()
    (batch, _, length, dim), (_, kv_heads, k_len, v_dim) = x.q.shape, x.v.shape
    config = configure(dim, v_dim, x.q.dtype, x.v.dtype)
    parts = cut(batch, kv_heads, length, config, x.q.device, x.cu_seqlens)
    k_parts = parts if causal else cut(batch, kv_heads, k_len, config, x.q.device, x.cu_seqlens)
    packed = x.cu_seqlens is not None  # then there may be rows that no program writes
    d_q, d_k, d_v = (empty_like_heads(t, t.shape[3], t.dtype, zero=packed) for t in (x.q, x.k, x.v))
    mean = centre.mean_values(x) if centre.worthwhile(config, feature_map, normalize) else None
    if mean is not None:
        x = centre.centred(x, mean, feature_map, causal)
    dots = x.inverses.new_empty(x.inverses.shape)
    d_s0, d_z0 = (t.new_empty(0 if x.s0 is None and causal else t.shape) for t in (x.s1, x.z1))
    before: States = (x.s0, x.z0, None, None)
    after: States = (x.d_s1, x.d_z1, None, None)
    q_lengths = x.lengths if causal else None  # without causality queries have no padding: the lengths are the keys'
    if not causal or parts.several:
        late = sum_gradients(x._replace(lengths=q_lengths), dots, feature_map, normalize, scale, parts, config)
        before, after = (x.s0, x.z0, x.sums, x.z_sums), (x.d_s1, x.d_z1, *late)
    if not causal:
        join(x.d_s1, x.d_z1, *late, d_s0, d_z0, parts, normalize, config)
        before, after = (x.s1, x.z1, None, None), (d_s0, d_z0, None, None)
    how = Walk(config, feature_map, normalize, causal, scale)
    given = x._replace(lengths=q_lengths)
    grad_queries(given, dots, d_q, before, how, parts, find_dots=causal and not parts.several)
    grad_keys(x, dots, d_k, after, (d_s0 if causal and x.s0 is not None else None, d_z0), how, k_parts)
    grad_values(x, d_v, after, how, k_parts)
    if mean is not None and d_s0.numel():
        d_z0 = d_z0 - centre.passed_on(d_s0, mean)
    if x.s0 is None:
        d_s0, d_z0 = d_s0.new_empty(0), d_s0.new_empty(0)
    return d_q, d_k, d_v, d_s0, d_z0


def grad_queries(
    x: Given,
    dots: Tensor,
    d_q: Tensor,
    before: States,
    how: Walk,
    parts: Parts,
    *,
    find_dots: bool,
    lag: int | None = None,
) -> None:
    """Write d_q and, if they are to be found, the dots; `before` are the initial state and the sums of the parts."""
    from attnzoo.ops.linear.triton import kernels_grad_queries as kernels

    tiles = how.config.queries
    launch(
        kernels.grad_queries,
        (parts.programs, x.q.shape[1], blocks(how.config.dim, tiles)),
        x.q,
        x.k,
        x.v,
        x.d_out,
        x.out if find_dots else None,
        x.inverses,
        dots,
        d_q,
        *before,
        x.log_decay,
        x.lengths,
        x.cu_seqlens,
        parts.table,
        *strides(x.q, x.k, x.v, x.d_out, x.out, d_q),
        x.q.shape[2],
        parts.parts,
        parts.part,
        lag,
        how.scale,
        **how.constants(tiles, x.q.shape[2], x, by_features=True, GROUP=x.group),
    )


def grad_keys(
    x: Given,
    dots: Tensor,
    d_k: Tensor,
    after: States,
    first: tuple[Tensor | None, Tensor | None],
    how: Walk,
    parts: Parts,
    *,
    lag: int | None = None,
) -> None:
    """Write d_k and, if they are wanted, the `first` state's gradients; `after` are the last one's, and sums."""
    from attnzoo.ops.linear.triton import kernels_grad_keys as kernels

    tiles = how.config.keys
    launch(
        kernels.grad_keys,
        (parts.programs, x.k.shape[1], blocks(how.config.dim, tiles)),
        x.q,
        x.k,
        x.v,
        x.d_out,
        x.inverses,
        dots,
        d_k,
        *after,
        *first,
        x.log_decay,
        x.lengths,
        x.cu_seqlens,
        parts.table,
        *strides(x.q, x.k, x.v, x.d_out, d_k),
        x.k.shape[2],
        parts.parts,
        parts.part,
        lag,
        how.scale,
        **how.constants(tiles, x.k.shape[2], x, by_features=True, GROUP=x.group if how.causal else 1),
    )


def grad_values(x: Given, d_v: Tensor, after: States, how: Walk, parts: Parts, *, lag: int | None = None) -> None:
    """Write d_v."""
    from attnzoo.ops.linear.triton import kernels_grad_keys as kernels

    tiles = how.config.values
    launch(
        kernels.grad_values,
        (parts.programs, x.k.shape[1], blocks(how.config.v_dim, tiles)),
        x.q,
        x.k,
        x.d_out,
        x.inverses,
        d_v,
        after[0],
        after[2],
        x.log_decay,
        x.lengths,
        x.cu_seqlens,
        parts.table,
        *strides(x.q, x.k, x.d_out, d_v),
        x.k.shape[2],
        parts.parts,
        parts.part,
        lag,
        how.scale,
        **how.constants(tiles, x.k.shape[2], x, GROUP=x.group if how.causal else 1),
    )


def sum_gradients(
    x: Given,
    dots: Tensor,
    feature_map: str,
    normalize: bool,
    scale: float,
    parts: Parts,
    config: Config,
    *,
    lag: int = 0,
) -> tuple[Tensor, Tensor]:
    """What each part's queries add to the gradient of the state, `[P, Hk, D, Dv]` and `[P, Hk, D]`.

    With the normaliser `dots [B, Hq, Sq]` are written: upstream gradient times output.
    """
    from attnzoo.ops.linear.triton.kernels_sums import sum_gradient_parts

    kv_heads, tiles = x.k.shape[1], config.sum_gradients
    sums = torch.empty(parts.programs, kv_heads, config.dim, config.v_dim, dtype=torch.float32, device=x.q.device)
    z_sums = sums.new_empty((parts.programs, kv_heads, config.dim) if normalize else 0)
    full = lag == 0 and is_full(x.q.shape[2], config, x.lengths, x.cu_seqlens)
    launch(
        sum_gradient_parts,
        (parts.programs, kv_heads, blocks(config.dim, tiles)),
        x.q,
        x.d_out,
        x.out,
        x.inverses,
        dots,
        sums,
        z_sums,
        x.log_decay,
        x.lengths,
        x.cu_seqlens,
        parts.table,
        *strides(x.q, x.d_out, x.out),
        x.q.shape[2],
        parts.parts,
        parts.part,
        lag,
        scale,
        **constants(config, tiles, normalize, feature_map, by_features=True, GROUP=x.group, FULL=full),
    )
    return sums, z_sums
