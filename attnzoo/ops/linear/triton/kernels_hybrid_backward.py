"""Softmax near, linear far, one normaliser, backward: queries' gradients forward, keys' and values' walking back.

With out_i = r_i / t_i the weight of key j has the gradient u_ij = (do_i . v_j - do_i . out_i) / t_i, near and far. A
near weight g e^(s_ij - c_i) passes g e^(s_ij - c_i) u_ij on to s_ij, and takes the sum of these back from the score
that is the largest, c_i (of equal ones from the first). `row_sums` holds that sum without g: summed over the tokens it
is g's gradient.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from attnzoo.ops.linear.triton.kernels_grad_queries import find_dots, load_inverse, load_tokens
from attnzoo.ops.linear.triton.kernels_hybrid import load_far_features, seen_near
from attnzoo.ops.linear.triton.states import gradient_after, state_before
from attnzoo.ops.linear.triton.tiles import (
    head_base,
    load_features,
    load_tile,
    locate,
    mask_weights,
    row_mask,
    store_tile,
    times_slope,
)


@triton.jit
def hybrid_grad_queries(
    q,
    k,
    v,
    f_q,
    f_k,
    gain,
    d_out,
    out,
    inverses,
    top,
    arg,
    dots,
    row_sums,
    d_q,
    d_fq,
    sums,
    z_sums,
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
    fq_b,
    fq_h,
    fq_s,
    fk_b,
    fk_h,
    fk_s,
    do_b,
    do_h,
    do_s,
    o_b,
    o_h,
    o_s,
    dq_b,
    dq_h,
    dq_s,
    df_b,
    df_h,
    df_s,
    length,
    parts,
    part,
    window,
    scale,
    GROUP: tl.constexpr,
    MAP: tl.constexpr,
    F: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BF: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_q and d_fq; dots and row_sums [B, Hq, S]."""
    q_head = tl.program_id(1)
    head = q_head // GROUP
    kv_heads = tl.num_programs(1) // GROUP
    n, row, begin, end, stop, place, _count = locate(lengths, cu_seqlens, table, length, parts, part)
    if place < 0:
        return
    q = head_base(q, row, q_head, q_b, q_h)
    k = head_base(k, row, head, k_b, k_h)
    v = head_base(v, row, head, v_b, v_h)
    f_q = head_base(f_q, row, q_head, fq_b, fq_h)
    f_k = head_base(f_k, row, head, fk_b, fk_h)
    d_out = head_base(d_out, row, q_head, do_b, do_h)
    out = head_base(out, row, q_head, o_b, o_h)
    d_q = head_base(d_q, row, q_head, dq_b, dq_h)
    d_fq = head_base(d_fq, row, q_head, df_b, df_h)
    at = (row.to(tl.int64) * tl.num_programs(1) + q_head) * length
    factor = tl.load(gain + q_head).to(tl.float32)
    s, z = state_before(
        None, None, sums, z_sums, n, place, head, kv_heads, begin, end, part, None, 0, 0, True, F, DV, BV, BF
    )
    start = begin + place * part
    for first in range(start, tl.minimum(start + part, stop), CHUNK):
        upstream = load_tile(d_out, do_s, first, begin, end, DV, CHUNK, BV, BV == DV, False).to(COMPUTE)
        inverse = load_inverse(inverses + at, first, begin, end, 1.0, True, CHUNK, False)
        found = find_dots(
            upstream, out, o_s, dots + at, first, begin, end, DV, True, BV, BV == DV, CHUNK, False, PRECISION
        )
        keys = load_far_features(f_k, fk_s, first - window, begin, end, F, CHUNK, BF, MAP, COMPUTE)
        values = load_tile(v, v_s, first - window, begin, end, DV, CHUNK, BV, BV == DV, False).to(COMPUTE)
        d_features = tl.dot(upstream, s.to(COMPUTE), input_precision=PRECISION) - found[:, None] * z[None, :]
        d_weights = tl.dot(upstream, tl.trans(values), input_precision=PRECISION) - found[:, None]
        d_weights = mask_weights(d_weights, None, False, CHUNK)
        d_features = tl.dot(d_weights.to(COMPUTE), keys, d_features, input_precision=PRECISION)
        s = tl.dot(tl.trans(values), keys, s, input_precision=PRECISION)
        z += tl.sum(keys.to(tl.float32), 0)
        mapped = load_features(f_q, fq_s, first, begin, end, F, CHUNK, BF, BF == F, False, MAP, COMPUTE)
        d_features = times_slope(d_features * inverse[:, None], mapped, MAP)
        store_tile(d_fq, df_s, first, begin, stop, F, d_features, CHUNK, BF, BF == F, False)

        real = row_mask(first, begin, end, CHUNK)
        rows = at + first + tl.arange(0, CHUNK)
        base = tl.load(top + rows, mask=real, other=0.0)
        holder = tl.load(arg + rows, mask=real, other=0)
        queries = load_tile(q, q_s, first, begin, end, D, CHUNK, BD, BD == D, False).to(COMPUTE)
        taken = tl.zeros([CHUNK], tl.float32)
        d_near = tl.zeros([CHUNK, BD], tl.float32)
        for other in range(tl.maximum(first - window + 1, begin), tl.minimum(first + CHUNK, end), CHUNK):
            own_keys = load_tile(k, k_s, other, begin, end, D, CHUNK, BD, BD == D, False).to(COMPUTE)
            own_values = load_tile(v, v_s, other, begin, end, DV, CHUNK, BV, BV == DV, False).to(COMPUTE)
            scores = tl.dot(queries, tl.trans(own_keys), input_precision=PRECISION) * (scale * 1.4426950408889634)
            seen = seen_near(first, other, window, end, CHUNK, False)
            p = tl.where(seen, tl.exp2(tl.where(seen, scores - base[:, None], 0.0)), 0.0)
            d_p = tl.dot(upstream, tl.trans(own_values), input_precision=PRECISION) - found[:, None]
            d_p = p * d_p * inverse[:, None]
            taken += tl.sum(d_p, 1)
            d_near = tl.dot(d_p.to(COMPUTE), own_keys, d_near, input_precision=PRECISION)
        columns = tl.arange(0, BD)
        largest = k + holder[:, None].to(tl.int64) * k_s + columns[None, :]
        largest = tl.load(largest, mask=real[:, None] & (columns < D)[None, :], other=0.0).to(tl.float32)
        d_near = (d_near - taken[:, None] * largest) * (factor * scale)
        store_tile(d_q, dq_s, first, begin, stop, D, d_near, CHUNK, BD, BD == D, False)
        tl.store(row_sums + rows, taken, mask=row_mask(first, begin, stop, CHUNK))


@triton.jit
def hybrid_grad_keys(
    q,
    k,
    v,
    f_q,
    f_k,
    gain,
    d_out,
    inverses,
    top,
    arg,
    dots,
    row_sums,
    d_k,
    d_v,
    d_fk,
    sums,
    z_sums,
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
    fq_b,
    fq_h,
    fq_s,
    fk_b,
    fk_h,
    fk_s,
    do_b,
    do_h,
    do_s,
    dk_b,
    dk_h,
    dk_s,
    dv_b,
    dv_h,
    dv_s,
    df_b,
    df_h,
    df_s,
    length,
    parts,
    part,
    window,
    scale,
    GROUP: tl.constexpr,
    MAP: tl.constexpr,
    F: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BF: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_k, d_v and d_fk."""
    head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    n, row, begin, end, stop, place, count = locate(lengths, cu_seqlens, table, length, parts, part)
    if place < 0:
        return
    k = head_base(k, row, head, k_b, k_h)
    v = head_base(v, row, head, v_b, v_h)
    f_k = head_base(f_k, row, head, fk_b, fk_h)
    d_k = head_base(d_k, row, head, dk_b, dk_h)
    d_v = head_base(d_v, row, head, dv_b, dv_h)
    d_fk = head_base(d_fk, row, head, df_b, df_h)
    s, z = gradient_after(
        None, None, sums, z_sums, n, place, count, head, kv_heads, begin, end, part, None, 0, 0, True, F, DV, BV, BF
    )
    start = begin + place * part
    chunks = tl.cdiv(tl.maximum(tl.minimum(start + part, stop) - start, 0), CHUNK)
    for step in range(0, chunks):
        first = start + (chunks - 1 - step) * CHUNK
        keys = load_tile(k, k_s, first, begin, end, D, CHUNK, BD, BD == D, False).to(COMPUTE)
        values = load_tile(v, v_s, first, begin, end, DV, CHUNK, BV, BV == DV, False).to(COMPUTE)
        mapped = load_features(f_k, fk_s, first, begin, end, F, CHUNK, BF, BF == F, False, MAP, COMPUTE)
        d_features = tl.dot(values, s.to(COMPUTE), input_precision=PRECISION) + z[None, :]
        d_values = tl.dot(mapped, tl.trans(s.to(COMPUTE)), input_precision=PRECISION)
        d_keys = tl.zeros([CHUNK, BD], tl.float32)
        for member in range(0, GROUP):
            q_head = head * GROUP + member
            at = (row.to(tl.int64) * (kv_heads * GROUP) + q_head) * length
            factor = tl.load(gain + q_head).to(tl.float32)
            own_q = head_base(q, row, q_head, q_b, q_h)
            own_f = head_base(f_q, row, q_head, fq_b, fq_h)
            given = head_base(d_out, row, q_head, do_b, do_h)

            late = first + window
            queries = load_features(own_f, fq_s, late, begin, end, F, CHUNK, BF, BF == F, False, MAP, COMPUTE)
            upstream = load_tile(given, do_s, late, begin, end, DV, CHUNK, BV, BV == DV, False).to(COMPUTE)
            inverse = load_inverse(inverses + at, late, begin, end, 1.0, True, CHUNK, False)
            found = load_tokens(dots + at, late, begin, end, CHUNK, False)
            queries = (queries * inverse[:, None]).to(COMPUTE)
            weights = tl.dot(mapped, tl.trans(queries), input_precision=PRECISION)
            weights = mask_weights(weights, None, True, CHUNK)
            d_values = tl.dot(weights.to(COMPUTE), upstream, d_values, input_precision=PRECISION)
            d_weights = tl.dot(values, tl.trans(upstream), input_precision=PRECISION) - found[None, :]
            d_weights = mask_weights(d_weights, None, True, CHUNK)
            d_features = tl.dot(d_weights.to(COMPUTE), queries, d_features, input_precision=PRECISION)
            s = tl.dot(tl.trans(upstream), queries, s, input_precision=PRECISION)
            z -= tl.sum(queries.to(tl.float32) * found[:, None], 0)

            for other in range(first, tl.minimum(first + CHUNK + window - 1, end), CHUNK):
                real = row_mask(other, begin, end, CHUNK)
                rows = at + other + tl.arange(0, CHUNK)
                base = tl.load(top + rows, mask=real, other=0.0)
                holder = tl.load(arg + rows, mask=real, other=-1)
                taken = tl.load(row_sums + rows, mask=real, other=0.0)
                near_queries = load_tile(own_q, q_s, other, begin, end, D, CHUNK, BD, BD == D, False).to(COMPUTE)
                near_up = load_tile(given, do_s, other, begin, end, DV, CHUNK, BV, BV == DV, False).to(COMPUTE)
                near_inverse = load_inverse(inverses + at, other, begin, end, 1.0, True, CHUNK, False)
                near_found = load_tokens(dots + at, other, begin, end, CHUNK, False)
                scores = tl.dot(keys, tl.trans(near_queries), input_precision=PRECISION) * (scale * 1.4426950408889634)
                seen = seen_near(other, first, window, end, CHUNK, True)
                p = tl.where(seen, tl.exp2(tl.where(seen, scores - base[None, :], 0.0)), 0.0)
                p = p * (factor * near_inverse)[None, :]
                d_values = tl.dot(p.to(COMPUTE), near_up, d_values, input_precision=PRECISION)
                d_p = tl.dot(values, tl.trans(near_up), input_precision=PRECISION) - near_found[None, :]
                chosen = (first + tl.arange(0, CHUNK))[:, None] == holder[None, :]
                d_p = (p * d_p - tl.where(chosen, (factor * taken)[None, :], 0.0)) * scale
                d_keys = tl.dot(d_p.to(COMPUTE), near_queries, d_keys, input_precision=PRECISION)
        real_rows = row_mask(first, begin, end, CHUNK)[:, None]
        d_features = tl.where(real_rows, times_slope(d_features, mapped, MAP), 0.0)
        store_tile(d_fk, df_s, first, begin, stop, F, d_features, CHUNK, BF, BF == F, False)
        store_tile(d_k, dk_s, first, begin, stop, D, tl.where(real_rows, d_keys, 0.0), CHUNK, BD, BD == D, False)
        store_tile(d_v, dv_s, first, begin, stop, DV, tl.where(real_rows, d_values, 0.0), CHUNK, BV, BV == DV, False)
