"""Softmax near, linear far, one normaliser (arXiv 2410.10254), forward: a walk over a part's chunks.

The far keys come `window` tokens late: so the walk over them is linear attention's, and a tile of the softmax meets
every chunk's queries with the keys of their window. F features, D dimensions of the softmax, DV of the values.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from attnzoo.ops.linear.triton.states import state_before
from attnzoo.ops.linear.triton.tiles import (
    head_base,
    inverse_or_zero,
    load_features,
    load_tile,
    locate,
    mask_weights,
    pieces,
    row_mask,
    store_tile,
    twice,
)


@triton.jit
def seen_near(query, key, window, end, CHUNK: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which keys from `key` on the queries from `query` on see in their window; rows are queries, or keys."""
    if TRANSPOSED:
        keys = key + tl.arange(0, CHUNK)[:, None]
        queries = query + tl.arange(0, CHUNK)[None, :]
    else:
        queries = query + tl.arange(0, CHUNK)[:, None]
        keys = key + tl.arange(0, CHUNK)[None, :]
    return (queries >= keys) & (queries - keys < window) & (keys < end) & (queries < end)


@triton.jit
def load_far_features(
    base,
    stride,
    first,
    low,
    high,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MAP: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """As `load_features`, 0 outside the rows [low, high): before a sequence's first far key there are none."""
    x = load_features(base, stride, first, low, high, width, ROWS, BLOCK, width == BLOCK, False, MAP, COMPUTE)
    return tl.where(row_mask(first, low, high, ROWS)[:, None], x, 0.0).to(COMPUTE)


@triton.jit
def hybrid_attend(
    q,
    k,
    v,
    f_q,
    f_k,
    gain,
    out,
    inverses,
    top,
    arg,
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
    o_b,
    o_h,
    o_s,
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
    """out [B, Hq, S, DV]; [B, Hq, S] of 1 / the normaliser, the largest near score (base 2) and the key that has it."""
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
    out = head_base(out, row, q_head, o_b, o_h)
    at = (row.to(tl.int64) * tl.num_programs(1) + q_head) * length
    factor = tl.load(gain + q_head).to(tl.float32)
    s, before = state_before(
        None, None, sums, z_sums, n, place, head, kv_heads, begin, end, part, None, 0, 0, True, F, DV, BV, BF
    )
    z = twice(before)
    ones = twice(tl.full([CHUNK], 1.0, COMPUTE)).to(COMPUTE)
    start = begin + place * part
    for first in range(start, tl.minimum(start + part, stop), CHUNK):
        mapped = load_features(f_q, fq_s, first, begin, end, F, CHUNK, BF, BF == F, False, MAP, COMPUTE)
        keys = load_far_features(f_k, fk_s, first - window, begin, end, F, CHUNK, BF, MAP, COMPUTE)
        values = load_tile(v, v_s, first - window, begin, end, DV, CHUNK, BV, BV == DV, False).to(COMPUTE)
        weights = tl.dot(mapped, tl.trans(keys), input_precision=PRECISION)
        weights = mask_weights(weights, None, False, CHUNK)
        far = tl.dot(mapped, tl.trans(s.to(COMPUTE)), input_precision=PRECISION)
        far = tl.dot(weights.to(COMPUTE), values, far, input_precision=PRECISION)
        weight = tl.sum(tl.dot(mapped, tl.trans(pieces(z, COMPUTE)), input_precision=PRECISION), 1) + tl.sum(weights, 1)
        s = tl.dot(tl.trans(values), keys, s, input_precision=PRECISION)
        z = tl.dot(ones, keys, z, input_precision=PRECISION)

        queries = load_tile(q, q_s, first, begin, end, D, CHUNK, BD, BD == D, False).to(COMPUTE)
        best = tl.full([CHUNK], -float("inf"), tl.float32)
        holder = tl.zeros([CHUNK], tl.int32)
        sum_near = tl.zeros([CHUNK], tl.float32)
        near = tl.zeros([CHUNK, BV], tl.float32)
        for other in range(tl.maximum(first - window + 1, begin), tl.minimum(first + CHUNK, end), CHUNK):
            own_keys = load_tile(k, k_s, other, begin, end, D, CHUNK, BD, BD == D, False).to(COMPUTE)
            own_values = load_tile(v, v_s, other, begin, end, DV, CHUNK, BV, BV == DV, False).to(COMPUTE)
            scores = tl.dot(queries, tl.trans(own_keys), input_precision=PRECISION) * (scale * 1.4426950408889634)
            scores = tl.where(seen_near(first, other, window, end, CHUNK, False), scores, -float("inf"))
            largest = tl.max(scores, 1)
            which = tl.min(tl.where(scores == largest[:, None], tl.arange(0, CHUNK)[None, :], CHUNK), 1)
            holder = tl.where(largest > best, other + which, holder)
            highest = tl.maximum(best, largest)
            base = tl.where(highest == -float("inf"), 0.0, highest)
            p = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(best - base)
            near = tl.dot(p.to(COMPUTE), own_values, near * shrink[:, None], input_precision=PRECISION)
            sum_near = sum_near * shrink + tl.sum(p, 1)
            best = highest
        weight = tl.where(row_mask(first, begin, end, CHUNK), weight + factor * sum_near, 0.0)
        inverse = inverse_or_zero(weight)
        result = (far + factor * near) * inverse[:, None]
        store_tile(out, o_s, first, begin, stop, DV, result, CHUNK, BV, BV == DV, False)
        rows, mask = at + first + tl.arange(0, CHUNK), row_mask(first, begin, stop, CHUNK)
        tl.store(inverses + rows, inverse, mask=mask)
        tl.store(top + rows, best, mask=mask)
        tl.store(arg + rows, holder, mask=mask)
