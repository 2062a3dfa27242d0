"""Linear attention backward, walking forward: queries' gradients, and what queries add to the state's gradient.

With out_i = r_i / t_i the weight of key j has the gradient (do_i . v_j - do_i . out_i) / t_i, where the second product
falls away without the normaliser t, whose place the scale takes. `dots` holds do_i . out_i. Programs hold a block of
the features' columns, and as in the forward the state is a product's first operand.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from attnzoo.ops.linear.triton.states import state_beside, store_state
from attnzoo.ops.linear.triton.tiles import (
    NARROW,
    decay_since,
    decay_until,
    head_base,
    load_features,
    load_late_features,
    load_rate,
    load_tile,
    load_tokens,
    locate,
    mask_weights,
    narrow_rows,
    real_tokens,
    row_mask,
    store_tile,
    times_slope,
)


@triton.jit
def load_inverse(inverses, first, low, high, scale, NORMALIZE: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr):
    """1 / t as the forward found it, or the scale; 0 outside the rows [low, high)."""
    if NORMALIZE:
        factor = load_tokens(inverses, first, low, high, CHUNK, FULL)
    elif FULL:
        factor = tl.full([CHUNK], 1.0, tl.float32) * scale
    else:
        factor = tl.where(row_mask(first, low, high, CHUNK), scale, 0.0)
    return factor


@triton.jit
def find_dots(
    upstream,
    out,
    o_s,
    dots,
    first,
    low,
    high,
    width,
    write,
    BV: tl.constexpr,
    EVEN: tl.constexpr,
    CHUNK: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """do . out, [CHUNK], from the tile of do; written to `dots` if `write`.

    In fp32 summed as a product sums do . v, so that where an output is nearly one value they differ by as little.
    """
    o = load_tile(out, o_s, first, low, high, width, CHUNK, BV, EVEN, FULL)
    if upstream.dtype == tl.float32 and PRECISION != "tf32":
        products = tl.dot(upstream, tl.trans(o.to(tl.float32)), input_precision=PRECISION)
        row = tl.arange(0, CHUNK)
        found = tl.sum(tl.where(row[:, None] == row[None, :], products, 0.0), 1)
    else:
        found = tl.sum(upstream.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(dots + first + tl.arange(0, CHUNK), found, mask=row_mask(first, low, high, CHUNK) & write)
    return found


@triton.jit
def sum_gradient_parts(
    q,
    d_out,
    out,
    inverses,
    dots,
    sums,
    z_sums,
    log_decay,
    lengths,
    cu_seqlens,
    table,
    q_b,
    q_h,
    q_s,
    do_b,
    do_h,
    do_s,
    o_b,
    o_h,
    o_s,
    length,
    parts,
    part,
    lag,
    scale,
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
    """sums [P, Hk, D, DV] and z_sums [P, Hk, D]: what the queries of each part, those `lag` tokens on, add to the
    state's gradient; with the normaliser also dots [B, Hq, length]."""
    head, d0 = tl.program_id(1), tl.program_id(2) * BD
    here = locate(lengths, cu_seqlens, table, length, parts, part)
    if here.place < 0:
        return
    row, begin, end = here.row, here.begin, here.end
    rate = load_rate(log_decay, head)
    s = tl.zeros([BV, BD], tl.float32)
    z = tl.zeros([NARROW, BD], tl.float32)
    chunks = tl.cdiv(tl.maximum(tl.minimum(here.start + part, end) - here.start, 0), CHUNK)
    heads = tl.num_programs(1) * GROUP
    for step in range(0, chunks * GROUP):
        first = here.start + (chunks - 1 - step // GROUP) * CHUNK
        q_head = head * GROUP + step % GROUP
        at = (row.to(tl.int64) * heads + q_head) * length
        late = first + lag
        own = head_base(q, row, q_head, q_b, q_h) + d0
        queries = load_features(own, q_s, late, begin, end, D - d0, CHUNK, BD, D % BD == 0, FULL, MAP, COMPUTE)
        given = head_base(d_out, row, q_head, do_b, do_h)
        upstream = load_tile(given, do_s, late, begin, end, DV, CHUNK, BV, BV == DV, FULL).to(COMPUTE)
        factor = load_inverse(inverses + at, late, begin, end, scale, NORMALIZE, CHUNK, FULL)
        if log_decay is not None:
            factor = factor * decay_since(rate, CHUNK)
            if step % GROUP == 0:
                fade = tl.exp(rate * real_tokens(first, end, CHUNK).to(tl.float32))
                s, z = s * fade, z * fade
        queries = (queries * factor[:, None]).to(COMPUTE)
        s = tl.dot(tl.trans(upstream), queries, s, input_precision=PRECISION)
        if NORMALIZE:
            o = head_base(out, row, q_head, o_b, o_h)
            found = find_dots(
                upstream, o, o_s, dots + at, late, begin, end, DV, d0 == 0, BV, BV == DV, CHUNK, FULL, PRECISION
            )
            z = tl.dot(narrow_rows(found, COMPUTE), queries, z, input_precision=PRECISION)
    index = tl.program_id(0) * tl.num_programs(1) + head
    store_state(sums, z_sums, index, 0, d0, s, -tl.sum(z, 0), NORMALIZE, D, DV, BV, BD)


@triton.jit
def grad_queries(
    q,
    k,
    v,
    d_out,
    out,
    inverses,
    dots,
    d_q,
    s0,
    z0,
    sums,
    z_sums,
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
    o_b,
    o_h,
    o_s,
    dq_b,
    dq_h,
    dq_s,
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
    """d_q, and if there is an `out` also dots [B, Hq, length]. Without causality all queries read the state s0.

    Keys come `lag` tokens late, if it is given.
    """
    q_head, d0 = tl.program_id(1), tl.program_id(2) * BD
    head = q_head // GROUP
    kv_heads = tl.num_programs(1) // GROUP
    here = locate(lengths, cu_seqlens, table, length, parts, part)
    if here.place < 0:
        return
    row, begin, end = here.row, here.begin, here.end
    at = (row.to(tl.int64) * tl.num_programs(1) + q_head) * length
    q = head_base(q, row, q_head, q_b, q_h) + d0
    k = head_base(k, row, head, k_b, k_h) + d0
    v = head_base(v, row, head, v_b, v_h)
    d_out = head_base(d_out, row, q_head, do_b, do_h)
    if out is not None:
        out = head_base(out, row, q_head, o_b, o_h)
    d_q = head_base(d_q, row, q_head, dq_b, dq_h) + d0
    inverses, dots = inverses + at, dots + at
    rate = load_rate(log_decay, head)
    before, z_before = state_beside(
        s0, z0, sums, z_sums, here, head, kv_heads, part, rate, 0, d0, False, NORMALIZE, D, DV, BV, BD
    )
    s = tl.trans(before)
    z = tl.where((tl.arange(0, NARROW) == 0)[None, :], z_before[:, None], 0.0)  # [BD, NARROW], columns that sum to z
    ones = tl.trans(narrow_rows(tl.full([CHUNK], 1.0, tl.float32), COMPUTE))
    for first in range(here.start, tl.minimum(here.start + part, here.stop), CHUNK):
        upstream = load_tile(d_out, do_s, first, begin, end, DV, CHUNK, BV, BV == DV, FULL).to(COMPUTE)
        inverse = load_inverse(inverses, first, begin, end, scale, NORMALIZE, CHUNK, FULL)
        d_features = tl.dot(s.to(COMPUTE), tl.trans(upstream), input_precision=PRECISION)  # [BD, CHUNK]
        if NORMALIZE:
            if out is not None:
                found = find_dots(
                    upstream, out, o_s, dots, first, begin, end, DV, d0 == 0, BV, BV == DV, CHUNK, FULL, PRECISION
                )
            else:
                found = load_tokens(dots, first, begin, end, CHUNK, FULL)
            d_features -= tl.sum(z, 1)[:, None] * found[None, :]
        if log_decay is not None:
            d_features = d_features * decay_since(rate, CHUNK)[None, :]
        if CAUSAL:
            source = first
            if lag is not None:
                source = first - lag
            all_real: tl.constexpr = FULL and lag is None
            keys = load_late_features(
                k, k_s, source, begin, end, D - d0, CHUNK, BD, D % BD == 0, all_real, MAP, COMPUTE, lag is not None
            )
            values = load_tile(v, v_s, source, begin, end, DV, CHUNK, BV, BV == DV, all_real).to(COMPUTE)
            d_weights = tl.dot(upstream, tl.trans(values), input_precision=PRECISION)  # [queries, keys]
            if NORMALIZE:
                d_weights -= found[:, None]
            d_weights = mask_weights(d_weights, rate, False, CHUNK).to(COMPUTE)
            columns = tl.trans(keys)
            d_features = tl.dot(columns, tl.trans(d_weights), d_features, input_precision=PRECISION)
            if log_decay is not None:
                real = real_tokens(first, end, CHUNK)
                fade = tl.exp(rate * real.to(tl.float32))
                columns = (columns * decay_until(rate, real, CHUNK)[None, :]).to(COMPUTE)
                s, z = s * fade, z * fade
            s = tl.dot(columns, values, s, input_precision=PRECISION)
            if NORMALIZE:
                z = tl.dot(columns, ones, z, input_precision=PRECISION)
        result = tl.trans(d_features * inverse[None, :])
        if MAP != "identity":
            queries = load_features(q, q_s, first, begin, end, D - d0, CHUNK, BD, D % BD == 0, FULL, MAP, COMPUTE)
            result = times_slope(result, queries, MAP)
        store_tile(d_q, dq_s, first, begin, here.stop, D - d0, result, CHUNK, BD, D % BD == 0, FULL)
