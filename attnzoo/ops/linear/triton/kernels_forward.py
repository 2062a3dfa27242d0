"""Linear attention forward: a walk over the chunks of each part of a sequence (its state before: `kernels_sums`).

A program holds a block of the values' columns and all features, and its state transposed [BV, BD]. If STATE_FIRST the
state is a matrix product's first operand, straight from the registers in which it is summed, and outputs come out
transposed: so a block may have 128 columns, over two groups of warps. The normaliser's sums z are a product with ones.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM102 (what is known when a kernel is compiled must be asked alone)

import triton
import triton.language as tl

from attnzoo.ops.linear.triton.features import load_features, load_late_features
from attnzoo.ops.linear.triton.kernels_sums import blank_keys
from attnzoo.ops.linear.triton.states import state_beside, store_state
from attnzoo.ops.linear.triton.tiles import (
    head_base,
    load_rate,
    load_tile,
    load_tokens,
    locate,
    row_mask,
    store_tile,
    store_tokens,
)
from attnzoo.ops.linear.triton.weights import (
    decay_since,
    decay_until,
    inverse_or_zero,
    mask_weights,
    pieces,
    real_tokens,
    twice,
)


@triton.jit
def scale_tokens(x, factor, TRANSPOSED: tl.constexpr):
    """x [CHUNK, N], or [N, CHUNK] if TRANSPOSED, times a factor [CHUNK]."""
    if TRANSPOSED:
        x = x * factor[None, :]
    else:
        x = x * factor[:, None]
    return x


@triton.jit
def attend(
    q,
    k,
    v,
    out,
    inverses,
    near_weights,
    s0,
    z0,
    sums,
    z_sums,
    s1,
    z1,
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
    o_b,
    o_h,
    o_s,
    length,
    parts,
    part,
    lag,
    scale,
    CAUSAL: tl.constexpr,
    STATE_FIRST: tl.constexpr,
    ALIKE: tl.constexpr,
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
    """out [B, Hq, S, DV], inverses [B, Hq, S] of the normaliser, and the last state s1, z1.

    Without causality all queries read the state s0, and there are no keys, values and last state. With `near_weights`
    [B, Hq, S] keys come `lag` tokens late, and `out` holds what the tokens between them and the queries give.
    """
    q_head, v0 = tl.program_id(1), tl.program_id(2) * BV
    head = q_head // GROUP
    kv_heads = tl.num_programs(1) // GROUP
    here = locate(lengths, cu_seqlens, table, length, parts, part)
    if here.place < 0:
        return
    row, begin, end = here.row, here.begin, here.end
    if ALIKE:
        k_s, v_s, o_s = q_s, q_s, q_s
    q = head_base(q, row, q_head, q_b, q_h)
    k = head_base(k, row, head, k_b, k_h)
    v = head_base(v, row, head, v_b, v_h) + v0
    out = head_base(out, row, q_head, o_b, o_h) + v0
    at = (row.to(tl.int64) * tl.num_programs(1) + q_head) * length
    inverses = inverses + at
    if near_weights is not None:
        near_weights = near_weights + at
    rate = load_rate(log_decay, head)
    s, before = state_beside(
        s0, z0, sums, z_sums, here, head, kv_heads, part, rate, v0, 0, False, NORMALIZE, D, DV, BV, BD
    )
    z = twice(before)
    ones = twice(tl.full([CHUNK], 1.0, COMPUTE)).to(COMPUTE)
    stop = tl.maximum(tl.minimum(here.start + part, here.stop), here.start)
    for first in range(here.start, stop, CHUNK):
        queries = load_features(q, q_s, first, begin, end, D, CHUNK, BD, BD == D, FULL, MAP, COMPUTE)
        if CAUSAL:
            source = first
            if lag is not None:
                source = first - lag
            all_real: tl.constexpr = FULL and lag is None
            keys = load_late_features(
                k, k_s, source, begin, end, D, CHUNK, BD, BD == D, all_real, MAP, COMPUTE, lag is not None
            )
            values = load_tile(v, v_s, source, begin, end, DV - v0, CHUNK, BV, DV % BV == 0, all_real).to(COMPUTE)
            weights = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            weights = mask_weights(weights, rate, False, CHUNK)
        if NORMALIZE:
            weight = tl.sum(tl.dot(queries, tl.trans(pieces(z, COMPUTE)), input_precision=PRECISION), 1)
        if STATE_FIRST:
            read = tl.dot(s.to(COMPUTE), tl.trans(queries), input_precision=PRECISION)  # [BV, CHUNK]
        else:
            read = tl.dot(queries, tl.trans(s.to(COMPUTE)), input_precision=PRECISION)  # [CHUNK, BV]
        if log_decay is not None:
            since = decay_since(rate, CHUNK)
            read = scale_tokens(read, since, STATE_FIRST)
            if NORMALIZE:
                weight = weight * since
        if CAUSAL:
            if NORMALIZE:
                weight += tl.sum(weights, 1)
            weights = weights.to(COMPUTE)
            if STATE_FIRST:
                read = tl.dot(tl.trans(values), tl.trans(weights), read, input_precision=PRECISION)
            else:
                read = tl.dot(weights, values, read, input_precision=PRECISION)
            if log_decay is not None:
                real = real_tokens(first, end, CHUNK)
                fade = tl.exp(rate * real.to(tl.float32))
                keys = (keys * decay_until(rate, real, CHUNK)[:, None]).to(COMPUTE)
                s, z = s * fade, z * fade
            s = tl.dot(tl.trans(values), keys, s, input_precision=PRECISION)
            if NORMALIZE:
                z = tl.dot(ones, keys, z, input_precision=PRECISION)
        if NORMALIZE:
            if not FULL:
                weight = tl.where(row_mask(first, begin, end, CHUNK), weight, 0.0)
            if near_weights is not None:
                near_weight = load_tokens(near_weights, first, begin, end, CHUNK, FULL)
                weight += near_weight
            inverse = inverse_or_zero(weight)
            read = scale_tokens(read, inverse, STATE_FIRST)
            if v0 == 0:
                store_tokens(inverses, first, begin, stop, inverse, CHUNK, FULL)
        elif FULL:
            read = read * scale
        else:
            read = scale_tokens(read, tl.where(row_mask(first, begin, end, CHUNK), scale, 0.0), STATE_FIRST)
        if STATE_FIRST:
            read = tl.trans(read)
        if near_weights is not None:
            near = load_tile(out, o_s, first, begin, end, DV - v0, CHUNK, BV, DV % BV == 0, FULL)
            read += near.to(tl.float32) * (near_weight * inverse)[:, None]
        store_tile(out, o_s, first, begin, stop, DV - v0, read, CHUNK, BV, DV % BV == 0, FULL)
    if s1 is not None:
        if (here.place == here.count - 1) & (q_head % GROUP == 0):
            chunks = tl.cdiv(stop - here.start, CHUNK)
            blank = blank_keys(here.start, chunks, begin, end, log_decay is not None, MAP, CHUNK)
            store_state(s1, z1, here.n * kv_heads + head, v0, 0, s, tl.sum(z, 0) / 2 - blank, NORMALIZE, D, DV, BV, BD)
