"""The forward's launches: sums of parts where a sequence has several, then outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.linear.triton import hopper_launch
from attnzoo.ops.linear.triton.launch import (
    blocks,
    constants,
    empty_like_heads,
    launch,
    rows_contiguous,
    state_constants,
    strides,
)
from attnzoo.ops.linear.triton.shapes import Config, Parts, configure, cut, is_full

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s0: Tensor | None,
    z0: Tensor | None,
    log_decay: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_map: str,
    normalize: bool,
    causal: bool,
    scale: float,
) -> Outputs:
    """What the operator returns."""
    q, k, v = (rows_contiguous(t) for t in (q, k, v))
    s0, z0 = (None if t is None else t.contiguous() for t in (s0, z0))
    (batch, _, length, dim), kv_heads, v_dim = q.shape, k.shape[1], v.shape[3]
    config = configure(dim, v_dim, q.dtype, v.dtype)
    parts = cut(batch, kv_heads, length, config, q.device, cu_seqlens)
    out, inverses, s1, z1 = outputs(q, k, v, cu_seqlens, normalize)
    full = is_full(length, config, lengths, cu_seqlens)
    hopper = log_decay is None and hopper_launch.takes(q, k, v, out, config, causal=causal, full=full)
    none = torch.empty(0, dtype=torch.float32, device=q.device)
    sums, z_sums = none, none.clone()
    before: tuple[Tensor | None, ...] = (s0, z0, None, None)
    if not causal:
        k_parts = cut(batch, kv_heads, k.shape[2], config, q.device, cu_seqlens)
        found = sum_keys(k, v, None, lengths, cu_seqlens, feature_map, normalize, k_parts, config, skip_last=False)
        join(s0, z0, *found, s1, z1, k_parts, normalize, config)
        before, lengths = (s1, z1, None, None), None  # queries have no padding: the lengths are the keys'
    elif parts.several:
        where = (log_decay, lengths, cu_seqlens)
        sums, z_sums = sum_keys(k, v, *where, feature_map, normalize, parts, config, followed=hopper)
        before = (s0, z0, sums, z_sums)
    last = (s1, z1) if causal else (None, None)
    if hopper:
        hopper_launch.attend(q, k, v, out, inverses, before, last, feature_map, normalize, scale, parts)
    else:
        kind = (feature_map, normalize, causal, scale)
        read_out(q, k, v, out, inverses, before, last, log_decay, lengths, cu_seqlens, *kind, parts, config)
    return out, inverses, s1, z1, sums, z_sums


def read_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    inverses: Tensor,
    before: tuple[Tensor | None, ...],
    last: tuple[Tensor | None, Tensor | None],
    log_decay: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_map: str,
    normalize: bool,
    causal: bool,
    scale: float,
    parts: Parts,
    config: Config,
    *,
    near_weights: Tensor | None = None,
    lag: int | None = None,
) -> None:
    """Write out, inverses and the last state from the states before: the initial ones, and the sums of the parts."""
    from attnzoo.ops.linear.triton import kernels_forward as kernels

    length, group, tiles = q.shape[2], q.shape[1] // k.shape[1], config.attend
    alike = q.stride(2) == k.stride(2) == v.stride(2) == out.stride(2)
    full = is_full(length, config, lengths, cu_seqlens)
    more: dict[str, Any] = {
        "CAUSAL": causal,
        "GROUP": group,
        "STATE_FIRST": tiles.state_first,
        "ALIKE": alike,
        "FULL": full,
    }
    launch(
        kernels.attend,
        (parts.programs, q.shape[1], blocks(v.shape[3], tiles)),
        q,
        k,
        v,
        out,
        inverses,
        near_weights,
        *before,
        *last,
        log_decay,
        lengths,
        cu_seqlens,
        parts.table,
        *strides(q, k, v, out),
        length,
        parts.parts,
        parts.part,
        lag,
        scale,
        **constants(config, tiles, normalize, feature_map, **more),
    )


def outputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for output, 1 / the normaliser and state. Only packed sequences leave rows that no program writes."""
    batch, kv_heads, _, dim = k.shape
    states = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = empty_like_heads(q, v.shape[3], v.dtype, zero=cu_seqlens is not None)
    wide: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    inverses = torch.empty(q.shape[:3] if normalize else 0, **wide)
    s1 = torch.empty(states, kv_heads, dim, v.shape[3], **wide)
    return out, inverses, s1, torch.empty((states, kv_heads, dim) if normalize else 0, **wide)


def sum_keys(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_map: str,
    normalize: bool,
    parts: Parts,
    config: Config,
    *,
    lag: int = 0,
    skip_last: bool = True,
    followed: bool = False,
) -> tuple[Tensor, Tensor]:
    """What each part's keys add to the state, `[P, Hk, D, Dv]` and `[P, Hk, D]`; unset for last parts if skipped.

    `followed`: `hopper_launch.attend` is launched next, and may begin at once.
    """
    from attnzoo.ops.linear.triton import kernels_sums as kernels

    kv_heads, tiles = k.shape[1], config.sums
    sums = torch.empty(parts.programs, kv_heads, config.dim, config.v_dim, dtype=torch.float32, device=k.device)
    z_sums = sums.new_empty((parts.programs, kv_heads, config.dim) if normalize else 0)
    full = lag == 0 and is_full(k.shape[2], config, lengths, cu_seqlens)
    launch(
        kernels.sum_parts,
        (parts.programs, kv_heads, blocks(config.v_dim, tiles)),
        k,
        v,
        sums,
        z_sums,
        log_decay,
        lengths,
        cu_seqlens,
        parts.table,
        *strides(k, v),
        k.shape[2],
        parts.parts,
        parts.part,
        lag,
        **constants(config, tiles, normalize, feature_map, SKIP_LAST=skip_last, FOLLOWED=followed, FULL=full),
    )
    return sums, z_sums


def join(
    s0: Tensor | None,
    z0: Tensor | None,
    sums: Tensor,
    z_sums: Tensor,
    s1: Tensor,
    z1: Tensor,
    parts: Parts,
    normalize: bool,
    config: Config,
) -> None:
    """Write s1 and z1: each sequence's state before, and the sums of its parts."""
    from attnzoo.ops.linear.triton import kernels_sums as kernels

    launch(
        kernels.join_parts,
        (*s1.shape[:2], blocks(config.v_dim, config.sums)),
        sums,
        z_sums,
        s0,
        z0,
        s1,
        z1,
        parts.firsts,
        parts.parts,
        **state_constants(config, config.sums, normalize),
    )
