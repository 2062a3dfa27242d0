"""The hybrid's softmax, backward (see `kernels_near`): programs of a few queries, then of a few keys."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from attnzoo.ops.linear.triton.kernels_near import seen_near
from attnzoo.ops.linear.triton.tiles import (
    head_base,
    load_tile,
    load_tokens,
    locate,
    row_mask,
    store_tile,
    store_tokens,
)


@triton.jit
def near_grad_queries(
    q,
    k,
    v,
    d_out,
    gain,
    inverses,
    dots,
    top,
    arg,
    row_sums,
    d_q,
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
    dq_b,
    dq_h,
    dq_s,
    length,
    parts,
    part,
    window,
    scale,
    ADD: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_q, if ADD on top of what it holds, and row_sums [B, Hq, S]."""
    q_head = tl.program_id(1)
    head = q_head // GROUP
    here = locate(lengths, cu_seqlens, table, length, parts, part)
    if here.place < 0:
        return
    row, begin, end, first = here.row, here.begin, here.end, here.start
    k = head_base(k, row, head, k_b, k_h)
    v = head_base(v, row, head, v_b, v_h)
    d_q = head_base(d_q, row, q_head, dq_b, dq_h)
    at = (row.to(tl.int64) * tl.num_programs(1) + q_head) * length
    own, given = head_base(q, row, q_head, q_b, q_h), head_base(d_out, row, q_head, do_b, do_h)
    queries = load_tile(own, q_s, first, begin, end, D, ROWS, BD, BD == D, False).to(COMPUTE)
    upstream = load_tile(given, do_s, first, begin, end, DV, ROWS, BV, BV == DV, False).to(COMPUTE)
    inverse = load_tokens(inverses + at, first, begin, end, ROWS, False)
    found = load_tokens(dots + at, first, begin, end, ROWS, False)
    base = load_tokens(top + at, first, begin, end, ROWS, False)
    taken = tl.zeros([ROWS], tl.float32)
    d_near = tl.zeros([ROWS, BD], tl.float32)
    for other in range(tl.maximum(first - window + 1, begin), tl.minimum(first + ROWS, end), COLUMNS):
        keys = load_tile(k, k_s, other, begin, end, D, COLUMNS, BD, BD == D, False).to(COMPUTE)
        values = load_tile(v, v_s, other, begin, end, DV, COLUMNS, BV, BV == DV, False).to(COMPUTE)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * 1.4426950408889634)
        seen = seen_near(first, other, window, ROWS, COLUMNS)
        p = tl.exp2(tl.where(seen, scores - base[:, None], -float("inf"))) * inverse[:, None]
        d_scores = p * (tl.dot(upstream, tl.trans(values), input_precision=PRECISION) - found[:, None])
        taken += tl.sum(d_scores, 1)
        d_near = tl.dot(d_scores.to(COMPUTE), keys, d_near, input_precision=PRECISION)
    real = row_mask(first, begin, end, ROWS)
    holder = tl.load(arg + at + first + tl.arange(0, ROWS), mask=real, other=0)
    columns = tl.arange(0, BD)
    largest = k + holder[:, None].to(tl.int64) * k_s + columns[None, :]
    largest = tl.load(largest, mask=real[:, None] & (columns < D)[None, :], other=0.0).to(tl.float32)
    factor = tl.load(gain + q_head).to(tl.float32) * scale
    d_near = (d_near - taken[:, None] * largest) * factor
    if ADD:
        d_near += load_tile(d_q, dq_s, first, begin, end, D, ROWS, BD, BD == D, False).to(tl.float32)
    stop = tl.minimum(first + part, here.stop)
    store_tile(d_q, dq_s, first, begin, stop, D, d_near, ROWS, BD, BD == D, False)
    store_tokens(row_sums + at, first, begin, stop, taken, ROWS, False)


@triton.jit
def near_grad_keys(
    q,
    k,
    v,
    d_out,
    gain,
    inverses,
    dots,
    top,
    arg,
    row_sums,
    d_k,
    d_v,
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
    dv_b,
    dv_h,
    dv_s,
    length,
    parts,
    part,
    window,
    scale,
    ADD: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_v on top of what it holds, and d_k, which it is too if ADD."""
    head = tl.program_id(1)
    here = locate(lengths, cu_seqlens, table, length, parts, part)
    if here.place < 0:
        return
    row, begin, end, first = here.row, here.begin, here.end, here.start
    own_k, own_v = head_base(k, row, head, k_b, k_h), head_base(v, row, head, v_b, v_h)
    d_k = head_base(d_k, row, head, dk_b, dk_h)
    d_v = head_base(d_v, row, head, dv_b, dv_h)
    keys = load_tile(own_k, k_s, first, begin, end, D, ROWS, BD, BD == D, False).to(COMPUTE)
    values = load_tile(own_v, v_s, first, begin, end, DV, ROWS, BV, BV == DV, False).to(COMPUTE)
    d_keys = tl.zeros([ROWS, BD], tl.float32)
    d_values = tl.zeros([ROWS, BV], tl.float32)
    for member in range(0, GROUP):
        q_head = head * GROUP + member
        at = (row.to(tl.int64) * (tl.num_programs(1) * GROUP) + q_head) * length
        factor = tl.load(gain + q_head).to(tl.float32)
        own, given = head_base(q, row, q_head, q_b, q_h), head_base(d_out, row, q_head, do_b, do_h)
        for other in range(first, tl.minimum(first + ROWS + window - 1, end), COLUMNS):
            queries = load_tile(own, q_s, other, begin, end, D, COLUMNS, BD, BD == D, False).to(COMPUTE)
            upstream = load_tile(given, do_s, other, begin, end, DV, COLUMNS, BV, BV == DV, False).to(COMPUTE)
            inverse = load_tokens(inverses + at, other, begin, end, COLUMNS, False) * factor
            found = load_tokens(dots + at, other, begin, end, COLUMNS, False)
            base = load_tokens(top + at, other, begin, end, COLUMNS, False)
            taken = load_tokens(row_sums + at, other, begin, end, COLUMNS, False) * factor
            real = row_mask(other, begin, end, COLUMNS)
            holder = tl.load(arg + at + other + tl.arange(0, COLUMNS), mask=real, other=-1)
            scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scale * 1.4426950408889634)
            seen = tl.trans(seen_near(other, first, window, COLUMNS, ROWS))
            p = tl.exp2(tl.where(seen, scores - base[None, :], -float("inf"))) * inverse[None, :]
            d_values = tl.dot(p.to(COMPUTE), upstream, d_values, input_precision=PRECISION)
            d_scores = p * (tl.dot(values, tl.trans(upstream), input_precision=PRECISION) - found[None, :])
            chosen = (first + tl.arange(0, ROWS))[:, None] == holder[None, :]
            d_scores -= tl.where(chosen, taken[None, :], 0.0)
            d_keys = tl.dot(d_scores.to(COMPUTE), queries, d_keys, input_precision=PRECISION)
    stop = tl.minimum(first + part, here.stop)
    d_keys = d_keys * scale
    if ADD:
        d_keys += load_tile(d_k, dk_s, first, begin, end, D, ROWS, BD, BD == D, False).to(tl.float32)
    d_values += load_tile(d_v, dv_s, first, begin, end, DV, ROWS, BV, BV == DV, False).to(tl.float32)
    store_tile(d_k, dk_s, first, begin, stop, D, d_keys, ROWS, BD, BD == D, False)
    store_tile(d_v, dv_s, first, begin, stop, DV, d_values, ROWS, BV, BV == DV, False)
