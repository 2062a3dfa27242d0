"""The backward kernel of the queries: scores computed again from q, k and the saved logsumexp (arXiv 2307.08691).

Two passes, each of which owns what it writes, so that results are the same each time: this one walks the keys of a tile
of queries; it runs first and leaves row statistics for the other, `key_gradient.py`.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from attnzoo.ops.softmax.triton.tiles import (
    LOG2E,
    UNSPECIALISED,
    accumulate,
    copied,
    count_partial,
    document_of,
    kept,
    key_range,
    load_rows,
    load_tile,
    masked,
    nth_partial,
    part_of_partial,
    score,
    sequence,
    stages,
    statistics_start,
)


@triton.jit(do_not_specialize=UNSPECIALISED)
def query_gradient_kernel(
    q,
    k,
    v,
    out,
    d_out,
    lse,  # [B, Hq, Sq]
    d_lse,  # [B, Hq, Sq] or None
    lse2,  # [B, Hq, stride_rows], written here: lse times log2(e), +inf for a query that sees no key
    delta,  # [B, Hq, stride_rows], written here: rows of d_out times out, less d_lse
    d_q,
    slopes,
    bias,
    dense,
    key_lengths,
    cu_q,
    cu_k,
    seed,
    k_tiles,
    v_tiles,
    tables,
    walk_starts,
    walk_partial,
    walk_tiles,
    walk_classes,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_ob,
    stride_oh,
    stride_os,
    stride_dob,
    stride_doh,
    stride_dos,
    stride_dqb,
    stride_dqh,
    stride_dqs,
    stride_rows,
    stride_bias_b,
    stride_bias_h,
    stride_bias_q,
    stride_bias_k,
    stride_dense_b,
    stride_dense_h,
    stride_dense_q,
    stride_dense_k,
    stride_slopes,
    heads,
    q_len,
    k_len,
    tiles_each,
    documents,
    window,
    ahead,
    scale,
    softcap,
    dropout_p,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    STEP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PROGRAM: tl.constexpr,
    ENDS: tl.constexpr,
    PARTIAL_STAGES: tl.constexpr,  # of the pipeline over partial tiles; few of them are worth none
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):
    """dQ. The arguments are those of the forward kernel; grids are alike too."""
    program = tl.program_id(0)
    tile = program % tiles_each
    head = (program // tiles_each) % heads
    batch = program // tiles_each // heads
    PACKED: tl.constexpr = DOCUMENTS > 0
    CHOSEN: tl.constexpr = PROGRAM is not None or dense is not None or bias is not None
    number = 0
    if PACKED:
        number, before = document_of(tile, cu_q, documents, BLOCK_M, DOCUMENTS)
        tile -= before
    else:
        tiles_of_one = tiles_each // STEP
        number = tile // tiles_of_one
        tile = tiles_of_one - 1 - tile % tiles_of_one
    if number < tl.maximum(documents, STEP):
        q_start, q_rows, k_start, _, k_seen, shift = sequence(
            number, batch, q_len, k_len, key_lengths, cu_q, cu_k, PACKED, STEP
        )
        if PACKED:  # a document's last queries first, as those of a mask without documents
            tile = tl.cdiv(q_rows, BLOCK_M) - 1 - tile
        first = tile * BLOCK_M
        if first < q_rows:
            head_k = head // GROUP
            q_base = q + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
            k_base = k + batch.to(tl.int64) * stride_kb + head_k.to(tl.int64) * stride_kh
            v_base = v + batch.to(tl.int64) * stride_vb + head_k.to(tl.int64) * stride_vh
            o_base = out + batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
            do_base = d_out + batch.to(tl.int64) * stride_dob + head.to(tl.int64) * stride_doh
            if PACKED or STEP > 1:
                q_base += q_start.to(tl.int64) * stride_qs
                k_base += k_start.to(tl.int64) * stride_ks
                v_base += k_start.to(tl.int64) * stride_vs
                o_base += q_start.to(tl.int64) * stride_os
                do_base += q_start.to(tl.int64) * stride_dos
            bias_base = bias
            if bias is not None:
                bias_base += batch.to(tl.int64) * stride_bias_b + head.to(tl.int64) * stride_bias_h
            dense_base = dense
            if dense is not None:
                dense_base += batch.to(tl.int64) * stride_dense_b + head.to(tl.int64) * stride_dense_h
            slope = 0.0
            if slopes is not None:
                slope = tl.load(slopes + batch * stride_slopes + head).to(tl.float32)

            t_row = first + tl.arange(0, BLOCK_M)
            exists = t_row < q_rows
            rows = (batch.to(tl.int64) * heads + head) * q_len + q_start + t_row * STEP
            # A query that sees no key gives nothing back, whatever it is and whatever arrives at it.
            sees_any = tl.load(lse + rows, mask=exists, other=float("-inf")) != float("-inf")
            row_lse = tl.load(lse + rows, mask=sees_any, other=float("inf")) * LOG2E
            q0 = load_rows(q_base, first, stride_qs * STEP, sees_any, BLOCK_M, 0, BLOCK_D, D)
            q1 = q0
            if BLOCK_E > 0:
                q1 = load_rows(q_base, first, stride_qs * STEP, sees_any, BLOCK_M, BLOCK_D, BLOCK_E, D)
            do = load_rows(do_base, first, stride_dos * STEP, sees_any, BLOCK_M, 0, BLOCK_DV, DV)
            o = load_rows(o_base, first, stride_os * STEP, sees_any, BLOCK_M, 0, BLOCK_DV, DV)
            row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
            if d_lse is not None:
                row_delta -= tl.load(d_lse + rows, mask=sees_any, other=0.0)
            row_base = (batch.to(tl.int64) * heads + head) * stride_rows
            padded = row_base + statistics_start(number, q_start, PACKED) + t_row * STEP
            written = exists
            if ENDS == 1:  # the copy engine reads the padding of the last tile too
                written = t_row < stride_rows
            tl.store(lse2 + padded, row_lse, mask=written)
            tl.store(delta + padded, row_delta, mask=written)
            acc0 = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            acc1 = tl.zeros([BLOCK_M, BLOCK_E if BLOCK_E > 0 else 1], tl.float32)

            for WALK in tl.static_range(3 if ENDS == 2 else 2):
                if walk_tiles is not None:
                    kind = 0
                    if walk_classes is not None:
                        kind = tl.load(walk_classes + head)
                    at = kind * (tiles_each // STEP) + tile
                    begin = tl.load(walk_starts + at)
                    end = tl.load(walk_starts + at + 1)
                    middle = begin + tl.load(walk_partial + at)
                    if key_lengths is not None or bias is not None:
                        middle = end  # what is hidden may lie in any tile
                    if WALK > 0:
                        end = middle
                    else:
                        begin = middle
                    lo = 0
                    full_lo = 0
                    full_hi = 0
                    hi = k_seen
                else:
                    lo, full_lo, full_hi, hi = key_range(
                        first, BLOCK_M, shift, k_seen, window, ahead, BLOCK_N, LEFT, RIGHT
                    )
                    begin = 0
                    end = (full_hi - full_lo) // BLOCK_N
                    if CHOSEN:
                        full_lo = lo
                        full_hi = lo
                        end = 0
                    if WALK > 0:
                        end = count_partial(lo, full_lo, full_hi, hi, BLOCK_N)
                        if ENDS == 2:
                            begin, end = part_of_partial(end, lo, full_lo, full_hi, k_seen, BLOCK_N, WALK == 1)
                listed = 0
                if walk_tiles is not None:
                    listed = tl.load(walk_tiles + begin, mask=begin < end, other=0)
                for n in tl.range(begin, end, num_stages=stages(WALK, ENDS, PARTIAL_STAGES)):
                    if walk_tiles is not None:
                        start = listed * BLOCK_N
                        # A tile ahead, so that nothing waits for the list.
                        listed = tl.load(walk_tiles + n + 1, mask=n + 1 < end, other=0)
                    elif WALK > 0:
                        start = nth_partial(n, lo, full_lo, full_hi, BLOCK_N)
                    else:
                        start = full_lo + n * BLOCK_N
                    u_row = start + tl.arange(0, BLOCK_N)
                    there = None if copied(WALK, ENDS) else u_row < k_seen
                    if not copied(WALK, ENDS) and walk_tiles is None:
                        there = u_row < hi
                        if LEFT:
                            there = there & (u_row > first + shift - window)
                    if not copied(WALK, ENDS) or k_tiles is None:
                        k0 = load_rows(k_base, start, stride_ks * STEP, there, BLOCK_N, 0, BLOCK_D, D)
                    else:
                        k0 = load_tile(k_tiles, batch, head_k, k_start + start, BLOCK_N, BLOCK_D)
                    if not copied(WALK, ENDS) or v_tiles is None:
                        vt = load_rows(v_base, start, stride_vs * STEP, there, BLOCK_N, 0, BLOCK_DV, DV)
                    else:
                        vt = load_tile(v_tiles, batch, head_k, k_start + start, BLOCK_N, BLOCK_DV)
                    k1 = k0
                    if BLOCK_E > 0:
                        there = u_row < k_seen if WALK > 0 and copied(WALK, ENDS) else there
                        k1 = load_rows(k_base, start, stride_ks * STEP, there, BLOCK_N, BLOCK_D, BLOCK_E, D)
                    t = t_row[:, None]
                    u = u_row[None, :]
                    inside = None  # rows and keys that do not exist are zeros here, and give none
                    if bias is not None or dense is not None:
                        inside = (t < q_rows) & (u < k_seen)
                    s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
                    if BLOCK_E > 0:
                        s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
                    if not CHOSEN or copied(WALK, ENDS):
                        dp = tl.dot(do, tl.trans(vt), input_precision=PRECISION)  # runs while p is computed
                    s, bent = score(
                        s, scale, softcap, slope, t + shift, u, bias_base, stride_bias_q, stride_bias_k,
                        q_start + t * STEP, k_start + u * STEP, inside,
                        softcap is not None, slopes is not None, STEP, FAST,
                    )  # fmt: skip
                    if WALK > 0:
                        s = masked(
                            s, float("-inf"), t + shift, u, inside, window, ahead, PROGRAM, tables, head, dense_base,
                            stride_dense_q, stride_dense_k, q_start + t * STEP, k_start + u * STEP, LEFT, RIGHT,
                        )  # fmt: skip
                        if CHOSEN and not copied(WALK, ENDS):
                            # What no query of the tile sees may be NaN, and 0 * NaN would spread it.
                            seen = tl.max((s != float("-inf")).to(tl.int32), 0)[:, None] > 0
                            k0 = tl.where(seen, k0, 0.0)
                            vt = tl.where(seen, vt, 0.0)
                            if BLOCK_E > 0:
                                k1 = tl.where(seen, k1, 0.0)
                            dp = tl.dot(do, tl.trans(vt), input_precision=PRECISION)
                    p = tl.exp2(s - row_lse[:, None])
                    if seed is not None:
                        keep = kept(seed, batch * heads + head, q_start + t * STEP, k_start + u * STEP, dropout_p)
                        dp = tl.where(keep, dp * (1.0 / (1.0 - dropout_p)), 0.0)
                    ds = p * (dp - row_delta[:, None])
                    if softcap is not None:
                        ds *= 1.0 - bent * bent
                        if not copied(WALK, ENDS):
                            ds = tl.where(p == 0.0, 0.0, ds)  # a key that nobody sees may be NaN, and so is bent
                    ds = ds.to(k0.dtype)
                    acc0 = accumulate(acc0, ds, k0, scale, PRECISION)
                    if BLOCK_E > 0:
                        acc1 = accumulate(acc1, ds, k1, scale, PRECISION)

            dq_base = d_q + batch.to(tl.int64) * stride_dqb + head.to(tl.int64) * stride_dqh
            at_rows = dq_base + (q_start + t_row * STEP).to(tl.int64)[:, None] * stride_dqs
            d = tl.arange(0, BLOCK_D)[None, :]
            tl.store(at_rows + d, (acc0 * scale).to(d_q.dtype.element_ty), mask=exists[:, None] & (d < D))
            if BLOCK_E > 0:
                d = BLOCK_D + tl.arange(0, BLOCK_E)[None, :]
                tl.store(at_rows + d, (acc1 * scale).to(d_q.dtype.element_ty), mask=exists[:, None] & (d < D))
