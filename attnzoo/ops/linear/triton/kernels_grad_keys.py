"""Linear attention backward, walking back: keys' and values' gradients (see `kernels_grad_queries`).

Programs hold a block of what they write: of the features' columns for keys, of the values' for values. With a `lag`
keys meet the queries that many tokens later.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM102 (what is known when a kernel is compiled must be asked alone)

import triton
import triton.language as tl

from attnzoo.ops.linear.triton.features import load_features, times_slope
from attnzoo.ops.linear.triton.states import state_beside, store_state
from attnzoo.ops.linear.triton.tiles import head_base, load_rate, load_tile, load_tokens, locate, row_mask, store_tile
from attnzoo.ops.linear.triton.weights import (
    NARROW,
    decay_since,
    decay_until,
    load_inverse,
    long_product,
    mask_weights,
    narrow_rows,
    real_tokens,
)


@triton.jit
def grad_keys(
    q,
    k,
    v,
    d_out,
    inverses,
    dots,
    d_k,
    d_s1,
    d_z1,
    sums,
    z_sums,
    d_s0,
    d_z0,
    log_decay,
    lengths,
    cu_seqlens,
    table,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    do_b,
    do_h,
    do_s,
    dk_b,
    dk_h,
    dk_s,
    length,
    parts,
    part,
    lag,
    scale,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MAP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    FULL: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_k, and if there is a d_s0 also d_z0. Without causality the gradient d_s1 of the state is all that keys need."""
    head, d0 = tl.program_id(1), tl.program_id(2) * BD
    here = locate(lengths, cu_seqlens, table, length, parts, part)
    if here.place < 0:
        return
    row, begin, end = here.row, here.begin, here.end
    kv_heads = tl.num_programs(1)
    k = head_base(k, row, head, k_b, k_h) + d0
    v = head_base(v, row, head, v_b, v_h)
    d_k = head_base(d_k, row, head, dk_b, dk_h) + d0
    rate = load_rate(log_decay, head)
    after, z_after = state_beside(
        d_s1, d_z1, sums, z_sums, here, head, kv_heads, part, rate, 0, d0, True, NORMALIZE, D, DV, BV, BD
    )
    s = tl.trans(after)
    z = tl.where((tl.arange(0, NARROW) == 0)[None, :], z_after[:, None], 0.0)  # [BD, NARROW], columns that sum to z
    chunks = tl.cdiv(tl.maximum(tl.minimum(here.start + part, here.stop) - here.start, 0), CHUNK)
    d_features = tl.zeros([BD, CHUNK], tl.float32)
    for step in range(0, chunks * GROUP):
        first = here.start + (chunks - 1 - step // GROUP) * CHUNK
        values = load_tile(v, v_s, first, begin, end, DV, CHUNK, BV, BV == DV, FULL).to(COMPUTE)
        if step % GROUP == 0:  # the chunk's keys meet the queries after it
            d_features = long_product(s.to(COMPUTE), tl.trans(values), PRECISION)
            if NORMALIZE:
                d_features += tl.sum(z, 1)[:, None]
            if log_decay is not None:
                real = real_tokens(first, end, CHUNK)
                d_features = d_features * decay_until(rate, real, CHUNK)[None, :]
                fade = tl.exp(rate * real.to(tl.float32))
                s, z = s * fade, z * fade
        if CAUSAL:
            q_head = head * GROUP + step % GROUP
            target = first
            if lag is not None:
                target = first + lag
            all_real: tl.constexpr = FULL and lag is None
            at = (row.to(tl.int64) * (kv_heads * GROUP) + q_head) * length
            own = head_base(q, row, q_head, q_b, q_h) + d0
            queries = load_features(
                own, q_s, target, begin, end, D - d0, CHUNK, BD, D % BD == 0, all_real, MAP, COMPUTE
            )
            given = head_base(d_out, row, q_head, do_b, do_h)
            upstream = load_tile(given, do_s, target, begin, end, DV, CHUNK, BV, BV == DV, all_real).to(COMPUTE)
            inverse = load_inverse(inverses + at, target, begin, end, scale, NORMALIZE, CHUNK, all_real)
            columns = tl.trans((queries * inverse[:, None]).to(COMPUTE))  # [BD, queries]
            d_weights = long_product(upstream, tl.trans(values), PRECISION)  # [queries, keys]
            if NORMALIZE:
                found = load_tokens(dots + at, target, begin, end, CHUNK, all_real)
                d_weights -= found[:, None]
            d_weights = mask_weights(d_weights, rate, False, CHUNK).to(COMPUTE)
            d_features = tl.dot(columns, d_weights, d_features, input_precision=PRECISION)
            if log_decay is not None:
                columns = (columns * decay_since(rate, CHUNK)[None, :]).to(COMPUTE)
            s = tl.dot(columns, upstream, s, input_precision=PRECISION)
            if NORMALIZE:
                z = tl.dot(columns, tl.trans(narrow_rows(-found, COMPUTE)), z, input_precision=PRECISION)
        if step % GROUP == GROUP - 1:
            result = tl.trans(d_features)
            if not FULL:  # nothing passes to keys in padding, whatever the state's gradient is
                result = tl.where(row_mask(first, begin, end, CHUNK)[:, None], result, 0.0)
            if MAP != "identity":
                keys = load_features(k, k_s, first, begin, end, D - d0, CHUNK, BD, D % BD == 0, FULL, MAP, COMPUTE)
                result = times_slope(result, keys, MAP)
            store_tile(d_k, dk_s, first, begin, here.stop, D - d0, result, CHUNK, BD, D % BD == 0, FULL)
    if d_s0 is not None:
        if here.place == 0:
            store_state(
                d_s0, d_z0, here.n * kv_heads + head, 0, d0, tl.trans(s), tl.sum(z, 1), NORMALIZE, D, DV, BV, BD
            )


@triton.jit
def grad_values(
    q,
    k,
    d_out,
    inverses,
    d_v,
    d_s1,
    sums,
    log_decay,
    lengths,
    cu_seqlens,
    table,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_s,
    do_b,
    do_h,
    do_s,
    dv_b,
    dv_h,
    dv_s,
    length,
    parts,
    part,
    lag,
    scale,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MAP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    FULL: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_v. Without causality the gradient d_s1 of the state is all that values need."""
    head, v0 = tl.program_id(1), tl.program_id(2) * BV
    here = locate(lengths, cu_seqlens, table, length, parts, part)
    if here.place < 0:
        return
    row, begin, end = here.row, here.begin, here.end
    kv_heads = tl.num_programs(1)
    k = head_base(k, row, head, k_b, k_h)
    d_v = head_base(d_v, row, head, dv_b, dv_h) + v0
    rate = load_rate(log_decay, head)
    s, _z = state_beside(d_s1, None, sums, None, here, head, kv_heads, part, rate, v0, 0, True, False, D, DV, BV, BD)
    chunks = tl.cdiv(tl.maximum(tl.minimum(here.start + part, here.stop) - here.start, 0), CHUNK)
    d_values = tl.zeros([BV, CHUNK], tl.float32)
    for step in range(0, chunks * GROUP):
        first = here.start + (chunks - 1 - step // GROUP) * CHUNK
        keys = load_features(k, k_s, first, begin, end, D, CHUNK, BD, BD == D, FULL, MAP, COMPUTE)
        if step % GROUP == 0:
            d_values = tl.dot(s.to(COMPUTE), tl.trans(keys), input_precision=PRECISION)  # [BV, CHUNK]
            if log_decay is not None:
                real = real_tokens(first, end, CHUNK)
                d_values = d_values * decay_until(rate, real, CHUNK)[None, :]
                s = s * tl.exp(rate * real.to(tl.float32))
        if CAUSAL:
            q_head = head * GROUP + step % GROUP
            target = first
            if lag is not None:
                target = first + lag
            all_real: tl.constexpr = FULL and lag is None
            at = (row.to(tl.int64) * (kv_heads * GROUP) + q_head) * length
            own = head_base(q, row, q_head, q_b, q_h)
            queries = load_features(own, q_s, target, begin, end, D, CHUNK, BD, BD == D, all_real, MAP, COMPUTE)
            given = head_base(d_out, row, q_head, do_b, do_h) + v0
            upstream = load_tile(given, do_s, target, begin, end, DV - v0, CHUNK, BV, DV % BV == 0, all_real).to(
                COMPUTE
            )
            inverse = load_inverse(inverses + at, target, begin, end, scale, NORMALIZE, CHUNK, all_real)
            queries = (queries * inverse[:, None]).to(COMPUTE)
            weights = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [queries, keys]
            weights = mask_weights(weights, rate, False, CHUNK).to(COMPUTE)
            d_values = tl.dot(tl.trans(upstream), weights, d_values, input_precision=PRECISION)
            if log_decay is not None:
                queries = (queries * decay_since(rate, CHUNK)[:, None]).to(COMPUTE)
            s = tl.dot(tl.trans(upstream), queries, s, input_precision=PRECISION)
        if step % GROUP == GROUP - 1:
            result = tl.trans(d_values)
            if not FULL:
                result = tl.where(row_mask(first, begin, end, CHUNK)[:, None], result, 0.0)
            store_tile(d_v, dv_s, first, begin, here.stop, DV - v0, result, CHUNK, BV, DV % BV == 0, FULL)
