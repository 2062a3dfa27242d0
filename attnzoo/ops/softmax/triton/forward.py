"""The forward kernel: FlashAttention-2's algorithm (arXiv 2307.08691) over every kind of sequence and mask.

A program owns BLOCK_M queries of one head. It walks the tiles of keys that they see, first those that they see whole,
then those that need a mask, and keeps the running maximum, sum and unscaled output in registers.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from attnzoo.ops.softmax.triton.tiles import (
    LN2,
    LOG2E,
    LOWEST,
    UNSPECIALISED,
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
)


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward_kernel(
    q,  # [B, Hq, Sq, D]
    k,  # [B, Hk, Sk, D]
    v,  # [B, Hk, Sk, DV]
    out,  # [B, Hq, Sq, DV]
    lse,  # [B, Hq, Sq], fp32
    sinks,  # [Hq] or None
    slopes,  # [B, Hq] or None
    bias,  # [B, Hq, Sq, Sk] or None
    dense,  # [B, Hq, Sq, Sk] or None
    key_lengths,  # [B] or None
    cu_q,  # [documents + 1] or None
    cu_k,
    seed,  # [] or None
    k_tiles,  # descriptors of k and v, or None: whole tiles are then read through pointers as well
    v_tiles,
    tables,  # what PROGRAM looks things up in, or None
    walk_starts,  # tiles of keys to walk for each tile of queries: see walks.py; or None
    walk_partial,
    walk_tiles,
    walk_classes,  # [Hq] or None
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
    tiles_each,  # programs for each head
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
    BLOCK_E: tl.constexpr,  # columns of q and k past BLOCK_D, 0 if there are none
    BLOCK_DV: tl.constexpr,
    DOCUMENTS: tl.constexpr,  # the next power of two after the number of documents, 0 if not packed
    STEP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PROGRAM: tl.constexpr,
    PLAIN: tl.constexpr,  # nothing is done to the scores but scaling by a positive number
    BOUNDED: tl.constexpr,  # scores lie within a softcap so low that exponentials need no maximum subtracted
    ENDS: tl.constexpr,  # of partial tiles, read like whole ones: 0 none, 1 all, 2 those that hang over no end
    PARTIAL_STAGES: tl.constexpr,  # of the pipeline over partial tiles; few of them are worth none
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):
    """Output and logsumexp of one tile of queries; the logsumexp is in natural units."""
    program = tl.program_id(0)
    tile = program % tiles_each
    head = (program // tiles_each) % heads
    batch = program // tiles_each // heads
    PACKED: tl.constexpr = DOCUMENTS > 0
    # Any key of a tile may be hidden from all of it.
    CHOSEN: tl.constexpr = PROGRAM is not None or dense is not None or bias is not None
    number = 0
    if PACKED:
        number, before = document_of(tile, cu_q, documents, BLOCK_M, DOCUMENTS)
        tile -= before
    else:
        tiles_of_one = tiles_each // STEP
        number = tile // tiles_of_one
        # The last queries of a causal mask see most keys: their programs start first, and none is left over at the end.
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
            q_base += q_start.to(tl.int64) * stride_qs if PACKED or STEP > 1 else 0
            k_base += k_start.to(tl.int64) * stride_ks if PACKED or STEP > 1 else 0
            v_base += k_start.to(tl.int64) * stride_vs if PACKED or STEP > 1 else 0
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
            q0 = load_rows(q_base, first, stride_qs * STEP, exists, BLOCK_M, 0, BLOCK_D, D)
            q1 = q0
            if BLOCK_E > 0:
                q1 = load_rows(q_base, first, stride_qs * STEP, exists, BLOCK_M, BLOCK_D, BLOCK_E, D)
            top = tl.full([BLOCK_M], 0.0 if BOUNDED else LOWEST, tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

            # One body for all walks: whole tiles, then partial ones.
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
                else:
                    lo, full_lo, full_hi, hi = key_range(
                        first, BLOCK_M, shift, k_seen, window, ahead, BLOCK_N, LEFT, RIGHT
                    )
                    begin = 0
                    end = (full_hi - full_lo) // BLOCK_N
                    if CHOSEN:  # no tile is known to be seen whole
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
                    k_there = None if copied(WALK, ENDS) else u_row < k_seen
                    v_there = k_there
                    if not copied(WALK, ENDS) and walk_tiles is None:
                        v_there = u_row < hi
                        if LEFT:
                            v_there = v_there & (u_row > first + shift - window)
                    if not copied(WALK, ENDS) or k_tiles is None:
                        k0 = load_rows(k_base, start, stride_ks * STEP, k_there, BLOCK_N, 0, BLOCK_D, D)
                    else:
                        k0 = load_tile(k_tiles, batch, head_k, k_start + start, BLOCK_N, BLOCK_D)
                    s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
                    if BLOCK_E > 0:
                        there = u_row < k_seen if WALK > 0 else None
                        k1 = load_rows(k_base, start, stride_ks * STEP, there, BLOCK_N, BLOCK_D, BLOCK_E, D)
                        s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
                    t = t_row[:, None]
                    u = u_row[None, :]
                    inside = u < k_seen
                    if bias is not None or dense is not None:
                        inside = inside & (t < q_rows)
                    if not PLAIN:
                        s, _bent = score(
                            s, scale, softcap, slope, t + shift, u, bias_base, stride_bias_q, stride_bias_k,
                            q_start + t * STEP, k_start + u * STEP, inside,
                            softcap is not None, slopes is not None, STEP, FAST,
                        )  # fmt: skip
                    if WALK > 0:
                        s = masked(
                            s, float("-inf"), t + shift, u, inside, window, ahead, PROGRAM, tables, head, dense_base,
                            stride_dense_q, stride_dense_k, q_start + t * STEP, k_start + u * STEP, LEFT, RIGHT,
                        )  # fmt: skip
                    if not copied(WALK, ENDS) or v_tiles is None:
                        vt = load_rows(v_base, start, stride_vs * STEP, v_there, BLOCK_N, 0, BLOCK_DV, DV)
                    else:
                        vt = load_tile(v_tiles, batch, head_k, k_start + start, BLOCK_N, BLOCK_DV)
                    if not copied(WALK, ENDS) and CHOSEN:
                        # What no query of the tile sees may be NaN, and 0 * NaN would spread it.
                        seen = tl.max((s != float("-inf")).to(tl.int32), 0)
                        vt = tl.where(seen[:, None] > 0, vt, 0.0)
                    if BOUNDED:
                        higher = top
                        p = tl.exp2(s)
                    elif PLAIN:  # the greatest score is the scaled greatest product, which saves a multiplication each
                        higher = tl.maximum(top, tl.max(s, 1) * (scale * LOG2E))
                        p = tl.exp2(s * (scale * LOG2E) - higher[:, None])
                    else:
                        higher = tl.maximum(top, tl.max(s, 1))
                        p = tl.exp2(s - higher[:, None])
                    if BOUNDED:
                        total += tl.sum(p, 1)
                    else:
                        shrink = tl.exp2(top - higher)
                        total = total * shrink + tl.sum(p, 1)
                        acc *= shrink[:, None]
                    if seed is not None:
                        keep = kept(seed, batch * heads + head, q_start + t * STEP, k_start + u * STEP, dropout_p)
                        p = tl.where(keep, p * (1.0 / (1.0 - dropout_p)), 0.0)
                    acc = tl.dot(p.to(vt.dtype), vt, acc, input_precision=PRECISION)
                    top = higher

            blind = total == 0.0
            if sinks is not None:
                sink = tl.load(sinks + head).to(tl.float32) * LOG2E
                higher = tl.maximum(top, sink)
                total = total * tl.exp2(top - higher) + tl.exp2(sink - higher)
                acc *= tl.exp2(top - higher)[:, None]
                top = higher
            total = tl.where(blind, 1.0, total)
            acc = tl.where(blind[:, None], 0.0, acc / total[:, None])
            row_lse = tl.where(blind, float("-inf"), (top + tl.log2(total)) * LN2)
            d = tl.arange(0, BLOCK_DV)
            out_base = out + batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
            rows = (q_start + t_row * STEP).to(tl.int64)
            out_at = out_base + rows[:, None] * stride_os + d[None, :]
            tl.store(out_at, acc.to(out.dtype.element_ty), mask=exists[:, None] & (d < DV)[None, :])
            lse_base = lse + (batch.to(tl.int64) * heads + head) * q_len
            tl.store(lse_base + rows, row_lse, mask=exists)
