"""The backward kernel of the keys and values: walks the queries of a tile of keys, over all heads of a group.

It runs after `query_gradient.py`, which says more, and reads the row statistics that this one leaves.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from attnzoo.ops.softmax.triton.tiles import (
    UNSPECIALISED,
    accumulate,
    copied,
    count_partial,
    document_of,
    kept,
    load_rows,
    load_tile,
    masked,
    nth_partial,
    part_of_partial,
    query_range,
    score,
    sequence,
    stages,
    statistics_start,
)


@triton.jit(do_not_specialize=UNSPECIALISED)
def key_gradient_kernel(
    q,
    k,
    v,
    d_out,
    lse2,  # [B, Hq, Sq], from the other kernel, and so is delta
    delta,
    d_k,
    d_v,
    slopes,
    bias,
    dense,
    key_lengths,
    cu_q,
    cu_k,
    seed,
    q_tiles,  # descriptors, or None
    do_tiles,
    lse2_tiles,
    delta_tiles,
    tables,
    walk_starts,  # tiles of queries to walk for each tile of keys, or None
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
    stride_dob,
    stride_doh,
    stride_dos,
    stride_dkb,
    stride_dkh,
    stride_dks,
    stride_dvb,
    stride_dvh,
    stride_dvs,
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
    """dK and dV, summed over the query heads of a group: a program owns BLOCK_N keys of one key/value head.

    Tiles are transposed here, keys by queries, so that probabilities are the left operand of every product.
    """
    program = tl.program_id(0)
    tile = program % tiles_each
    heads_k = heads // GROUP
    head_k = (program // tiles_each) % heads_k
    batch = program // tiles_each // heads_k
    PACKED: tl.constexpr = DOCUMENTS > 0
    CHOSEN: tl.constexpr = PROGRAM is not None or dense is not None or bias is not None
    number = 0
    if PACKED:
        number, before = document_of(tile, cu_k, documents, BLOCK_N, DOCUMENTS)
        tile -= before
    else:
        tiles_of_one = tiles_each // STEP
        number = tile // tiles_of_one
        tile = tile % tiles_of_one
    if number < tl.maximum(documents, STEP):
        q_start, q_rows, k_start, k_rows, k_seen, shift = sequence(
            number, batch, q_len, k_len, key_lengths, cu_q, cu_k, PACKED, STEP
        )
        first = tile * BLOCK_N
        if first < k_rows:
            k_base = k + batch.to(tl.int64) * stride_kb + head_k.to(tl.int64) * stride_kh
            v_base = v + batch.to(tl.int64) * stride_vb + head_k.to(tl.int64) * stride_vh
            if PACKED or STEP > 1:
                k_base += k_start.to(tl.int64) * stride_ks
                v_base += k_start.to(tl.int64) * stride_vs
            u_row = first + tl.arange(0, BLOCK_N)
            real = u_row < k_seen
            k0 = load_rows(k_base, first, stride_ks * STEP, real, BLOCK_N, 0, BLOCK_D, D)
            k1 = k0
            if BLOCK_E > 0:
                k1 = load_rows(k_base, first, stride_ks * STEP, real, BLOCK_N, BLOCK_D, BLOCK_E, D)
            vt = load_rows(v_base, first, stride_vs * STEP, real, BLOCK_N, 0, BLOCK_DV, DV)
            acc_k0 = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            acc_k1 = tl.zeros([BLOCK_N, BLOCK_E if BLOCK_E > 0 else 1], tl.float32)
            acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
            u = u_row[:, None]
            row_start = statistics_start(number, q_start, PACKED)

            for WALK in tl.static_range(3 if ENDS == 2 else 2):
                for member in tl.range(0, GROUP):
                    head = head_k * GROUP + member
                    q_base = q + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
                    do_base = d_out + batch.to(tl.int64) * stride_dob + head.to(tl.int64) * stride_doh
                    if PACKED or STEP > 1:
                        q_base += q_start.to(tl.int64) * stride_qs
                        do_base += q_start.to(tl.int64) * stride_dos
                    row_base = (batch.to(tl.int64) * heads + head) * stride_rows + row_start
                    bias_base = bias
                    if bias is not None:
                        bias_base += batch.to(tl.int64) * stride_bias_b + head.to(tl.int64) * stride_bias_h
                    dense_base = dense
                    if dense is not None:
                        dense_base += batch.to(tl.int64) * stride_dense_b + head.to(tl.int64) * stride_dense_h
                    slope = 0.0
                    if slopes is not None:
                        slope = tl.load(slopes + batch * stride_slopes + head).to(tl.float32)
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
                    else:
                        lo, full_lo, full_hi, hi = query_range(
                            first, BLOCK_N, shift, q_rows, k_seen, window, ahead, BLOCK_M, LEFT, RIGHT
                        )
                        begin = 0
                        end = (full_hi - full_lo) // BLOCK_M
                        if CHOSEN:
                            full_lo = lo
                            full_hi = lo
                            end = 0
                        if WALK > 0:
                            end = count_partial(lo, full_lo, full_hi, hi, BLOCK_M)
                            if ENDS == 2:
                                begin, end = part_of_partial(end, lo, full_lo, full_hi, q_rows, BLOCK_M, WALK == 1)
                    listed = 0
                    if walk_tiles is not None:
                        listed = tl.load(walk_tiles + begin, mask=begin < end, other=0)
                    for n in tl.range(begin, end, num_stages=stages(WALK, ENDS, PARTIAL_STAGES)):
                        if walk_tiles is not None:
                            start = listed * BLOCK_M
                            # A tile ahead, so that nothing waits for the list.
                            listed = tl.load(walk_tiles + n + 1, mask=n + 1 < end, other=0)
                        elif WALK > 0:
                            start = nth_partial(n, lo, full_lo, full_hi, BLOCK_M)
                        else:
                            start = full_lo + n * BLOCK_M
                        t_row = start + tl.arange(0, BLOCK_M)
                        there = None
                        if not copied(WALK, ENDS) or (WALK > 0 and lse2_tiles is None):
                            # A query that sees no key may be NaN, and so may what arrives at its output.
                            row_lse = tl.load(lse2 + row_base + t_row * STEP, mask=t_row < q_rows, other=float("inf"))
                            row_delta = tl.load(delta + row_base + t_row * STEP, mask=t_row < q_rows, other=0.0)
                            there = row_lse != float("inf")
                        elif lse2_tiles is None:
                            row_lse = tl.load(lse2 + row_base + t_row * STEP)
                            row_delta = tl.load(delta + row_base + t_row * STEP)
                        else:
                            row_lse = lse2_tiles.load([batch * heads + head, row_start + start]).reshape([BLOCK_M])
                            row_delta = delta_tiles.load([batch * heads + head, row_start + start]).reshape([BLOCK_M])
                        if not copied(WALK, ENDS) or q_tiles is None:
                            q0 = load_rows(q_base, start, stride_qs * STEP, there, BLOCK_M, 0, BLOCK_D, D)
                        else:
                            q0 = load_tile(q_tiles, batch, head, q_start + start, BLOCK_M, BLOCK_D)
                        if not copied(WALK, ENDS) or do_tiles is None:
                            do = load_rows(do_base, start, stride_dos * STEP, there, BLOCK_M, 0, BLOCK_DV, DV)
                        else:
                            do = load_tile(do_tiles, batch, head, q_start + start, BLOCK_M, BLOCK_DV)
                        q1 = q0
                        if BLOCK_E > 0:
                            there = t_row < q_rows if WALK > 0 and copied(WALK, ENDS) else there
                            q1 = load_rows(q_base, start, stride_qs * STEP, there, BLOCK_M, BLOCK_D, BLOCK_E, D)
                        t = t_row[None, :]
                        # Rows that do not exist are zeros here and have no part in p; keys that do not are not stored.
                        inside = None
                        if bias is not None or dense is not None:
                            inside = (t < q_rows) & (u < k_seen)
                        s = tl.dot(k0, tl.trans(q0), input_precision=PRECISION)
                        if BLOCK_E > 0:
                            s = tl.dot(k1, tl.trans(q1), s, input_precision=PRECISION)
                        dp = tl.dot(vt, tl.trans(do), input_precision=PRECISION)  # runs while p is computed
                        s, bent = score(
                            s, scale, softcap, slope, t + shift, u, bias_base, stride_bias_q, stride_bias_k,
                            q_start + t * STEP, k_start + u * STEP, inside,
                            softcap is not None, slopes is not None, STEP, FAST,
                        )  # fmt: skip
                        if WALK > 0:
                            s = masked(
                                s, float("-inf"), t + shift, u, inside, window, ahead, PROGRAM, tables, head,
                                dense_base, stride_dense_q, stride_dense_k, q_start + t * STEP, k_start + u * STEP,
                                LEFT, RIGHT,
                            )  # fmt: skip
                        p = tl.exp2(s - row_lse[None, :])
                        weight = p
                        if softcap is not None:
                            weight = p * (1.0 - bent * bent)
                        dropped = p
                        if seed is not None:
                            keep = kept(seed, batch * heads + head, q_start + t * STEP, k_start + u * STEP, dropout_p)
                            dropped = tl.where(keep, p * (1.0 / (1.0 - dropout_p)), 0.0)
                            dp = tl.where(keep, dp * (1.0 / (1.0 - dropout_p)), 0.0)
                        acc_v = accumulate(acc_v, dropped.to(do.dtype), do, scale, PRECISION)
                        ds = weight * (dp - row_delta[None, :])
                        if not copied(WALK, ENDS):
                            ds = tl.where(p == 0.0, 0.0, ds)  # a key that nobody sees may be NaN, and so its dp
                        ds = ds.to(q0.dtype)
                        acc_k0 = accumulate(acc_k0, ds, q0, scale, PRECISION)
                        if BLOCK_E > 0:
                            acc_k1 = accumulate(acc_k1, ds, q1, scale, PRECISION)

            exists = u < k_rows
            real = real[:, None]
            rows = (k_start + u * STEP).to(tl.int64)
            dk_base = d_k + batch.to(tl.int64) * stride_dkb + head_k.to(tl.int64) * stride_dkh
            dv_base = d_v + batch.to(tl.int64) * stride_dvb + head_k.to(tl.int64) * stride_dvh
            d = tl.arange(0, BLOCK_D)[None, :]
            acc_k0 = tl.where(real, acc_k0 * scale, 0.0)
            tl.store(dk_base + rows * stride_dks + d, acc_k0.to(d_k.dtype.element_ty), mask=exists & (d < D))
            if BLOCK_E > 0:
                d = BLOCK_D + tl.arange(0, BLOCK_E)[None, :]
                acc_k1 = tl.where(real, acc_k1 * scale, 0.0)
                tl.store(dk_base + rows * stride_dks + d, acc_k1.to(d_k.dtype.element_ty), mask=exists & (d < D))
            d = tl.arange(0, BLOCK_DV)[None, :]
            acc_v = tl.where(real, acc_v, 0.0)
            tl.store(dv_base + rows * stride_dvs + d, acc_v.to(d_v.dtype.element_ty), mask=exists & (d < DV))
