"""The softmax of the hybrid (arXiv 2410.10254): the last `window` keys of every query, which programs look at alone.

Its normaliser is shared with the keys before (see `kernels_forward`), so a near weight is g e^(s_ij - c_i) / t_i, where
the forward keeps the largest score c_i, the key that has it and 1 / t_i. The backward gives s_ij the gradient
u_ij = g e^(s_ij - c_i) (do_i . v_j - do_i . out_i) / t_i, and takes the sum of these back from the score that is c_i.
`row_sums` holds that sum without g: summed over the tokens it is g's gradient. Scores here have base 2.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from attnzoo.ops.linear.triton.tiles import head_base, load_tile, locate, row_mask, store_tile, store_tokens
from attnzoo.ops.linear.triton.weights import inverse_or_zero


@triton.jit
def seen_near(query, key, window, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """[QUERIES, KEYS]: which keys from `key` on the queries from `query` on see in their window."""
    age = (query + tl.arange(0, QUERIES))[:, None] - (key + tl.arange(0, KEYS))[None, :]
    return age.to(tl.uint32, bitcast=True) < window  # below 0 it is a large number


@triton.jit
def near_attend(
    q,
    k,
    v,
    gain,
    out,
    weights,
    top,
    arg,
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
    window,
    scale,
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
    """out [B, Hq, S, DV] of the near keys alone, their weight with g, the largest score and its key, all [B, Hq, S]."""
    q_head = tl.program_id(1)
    head = q_head // GROUP
    here = locate(lengths, cu_seqlens, table, length, parts, part)
    if here.place < 0:
        return
    row, begin, end, first = here.row, here.begin, here.end, here.start
    k = head_base(k, row, head, k_b, k_h)
    v = head_base(v, row, head, v_b, v_h)
    at = (row.to(tl.int64) * tl.num_programs(1) + q_head) * length
    own = head_base(q, row, q_head, q_b, q_h)
    queries = load_tile(own, q_s, first, begin, end, D, ROWS, BD, BD == D, False).to(COMPUTE)
    best = tl.full([ROWS], -float("inf"), tl.float32)
    holder = tl.zeros([ROWS], tl.int32)
    total = tl.zeros([ROWS], tl.float32)
    near = tl.zeros([ROWS, BV], tl.float32)
    for other in range(tl.maximum(first - window + 1, begin), tl.minimum(first + ROWS, end), COLUMNS):
        keys = load_tile(k, k_s, other, begin, end, D, COLUMNS, BD, BD == D, False).to(COMPUTE)
        values = load_tile(v, v_s, other, begin, end, DV, COLUMNS, BV, BV == DV, False).to(COMPUTE)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * 1.4426950408889634)
        scores = tl.where(seen_near(first, other, window, ROWS, COLUMNS), scores, -float("inf"))
        largest = tl.max(scores, 1)
        which = tl.min(tl.where(scores == largest[:, None], tl.arange(0, COLUMNS)[None, :], COLUMNS), 1)
        holder = tl.where(largest > best, other + which, holder)
        highest = tl.maximum(best, largest)
        base = tl.where(highest == -float("inf"), 0.0, highest)
        p = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(best - base)
        near = tl.dot(p.to(COMPUTE), values, near * shrink[:, None], input_precision=PRECISION)
        total = total * shrink + tl.sum(p, 1)
        best = highest
    total = tl.where(row_mask(first, begin, end, ROWS), total, 0.0)
    near = near * inverse_or_zero(total)[:, None]
    stop = tl.minimum(first + part, here.stop)
    given = head_base(out, row, q_head, o_b, o_h)
    store_tile(given, o_s, first, begin, stop, DV, near, ROWS, BV, BV == DV, False)
    store_tokens(weights + at, first, begin, stop, total * tl.load(gain + q_head).to(tl.float32), ROWS, False)
    store_tokens(top + at, first, begin, stop, best, ROWS, False)
    store_tokens(arg + at, first, begin, stop, holder, ROWS, False)
