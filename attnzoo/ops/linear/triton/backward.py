"""The backward's launches: sums of parts where a sequence has several, then the gradients."""

from __future__ import annotations

from typing import Any

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
from attnzoo.ops.linear.triton.shapes import Config, Parts, configure, cut, is_full

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def gradients(given: Given, feature_map: str, normalize: bool, causal: bool, scale: float) -> Gradients:
    """Gradients of q, k, v and the initial state."""
    from attnzoo.ops.linear.triton.kernels_grad_keys import grad_keys, grad_values
    from attnzoo.ops.linear.triton.kernels_grad_queries import grad_queries

    x = given.tidy()
    (batch, heads, length, dim), (_, kv_heads, k_len, v_dim) = x.q.shape, x.v.shape
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
    before: tuple[Tensor | None, ...] = (x.s0, x.z0, None, None)
    after: tuple[Tensor | None, ...] = (x.d_s1, x.d_z1, None, None)
    q_lengths = x.lengths if causal else None  # without causality queries have no padding: the lengths are the keys'
    if not causal or parts.several:
        late = sum_gradients(x._replace(lengths=q_lengths), dots, feature_map, normalize, scale, parts, config)
        before, after = (x.s0, x.z0, x.sums, x.z_sums), (x.d_s1, x.d_z1, *late)
    if not causal:
        join(x.d_s1, x.d_z1, *late, d_s0, d_z0, parts, normalize, config)
        before, after = (x.s1, x.z1, None, None), (d_s0, d_z0, None, None)
    full = is_full(length, config, q_lengths, x.cu_seqlens)
    kind: dict[str, Any] = {"CAUSAL": causal, "GROUP": x.group}
    tail = (x.cu_seqlens, parts.table)
    launch(
        grad_queries,
        (parts.programs, heads, blocks(dim, config.queries)),
        x.q,
        x.k,
        x.v,
        x.d_out,
        None if parts.several or not causal else x.out,
        x.inverses,
        dots,
        d_q,
        *before,
        x.log_decay,
        q_lengths,
        *tail,
        *strides(x.q, x.k, x.v, x.d_out, x.out, d_q),
        length,
        parts.parts,
        parts.part,
        scale,
        **constants(
            config,
            config.queries,
            normalize,
            feature_map,
            by_features=True,
            CAUSAL=causal,
            GROUP=x.group,
            FULL=full,
        ),
    )
    kind["GROUP"] = x.group if causal else 1
    full = is_full(k_len, config, x.lengths, x.cu_seqlens)
    sizes = (k_len, k_parts.parts, k_parts.part, scale)
    where = (x.log_decay, x.lengths, x.cu_seqlens, k_parts.table)
    launch(
        grad_keys,
        (k_parts.programs, kv_heads, blocks(dim, config.keys)),
        x.q,
        x.k,
        x.v,
        x.d_out,
        x.inverses,
        dots,
        d_k,
        *after,
        d_s0 if causal and x.s0 is not None else None,
        d_z0,
        *where,
        *strides(x.q, x.k, x.v, x.d_out, d_k),
        *sizes,
        **constants(config, config.keys, normalize, feature_map, by_features=True, FULL=full, **kind),
    )
    launch(
        grad_values,
        (k_parts.programs, kv_heads, blocks(v_dim, config.values)),
        x.q,
        x.k,
        x.d_out,
        x.inverses,
        d_v,
        after[0],
        after[2],
        *where,
        *strides(x.q, x.k, x.d_out, d_v),
        *sizes,
        **constants(config, config.values, normalize, feature_map, FULL=full, **kind),
    )
    if mean is not None and d_s0.numel():
        d_z0 = d_z0 - centre.passed_on(d_s0, mean)
    if x.s0 is None:
        d_s0, d_z0 = d_s0.new_empty(0), d_s0.new_empty(0)
    return d_q, d_k, d_v, d_s0, d_z0


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
    from attnzoo.ops.linear.triton.kernels_grad_queries import sum_gradient_parts

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
