"""Linear attention backward, walking forward: queries' gradients.

With out_i = r_i / t_i the weight of key j has the gradient (do_i . v_j - do_i . out_i) / t_i, where the second product
falls away without the normaliser t, whose place the scale takes. `dots` holds do_i . out_i. Programs hold a block of
the features' columns, and as in the forward the state is a product's first operand.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from attnzoo.ops.linear.triton.features import load_features, load_late_features, times_slope
from attnzoo.ops.linear.triton.states import state_beside
from attnzoo.ops.linear.triton.tiles import head_base, load_rate, load_tile, load_tokens, locate, store_tile
from attnzoo.ops.linear.triton.weights import (
    NARROW,
    decay_since,
    decay_until,
    find_dots,
    load_inverse,
    long_product,
    mask_weights,
    narrow_rows,
    real_tokens,
)


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
        d_features = long_product(s.to(COMPUTE), tl.trans(upstream), PRECISION)  # [BD, CHUNK]
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
            d_weights = long_product(upstream, tl.trans(values), PRECISION)  # [queries, keys]
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
