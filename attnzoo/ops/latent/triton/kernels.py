"""Flash-decoding over latents: each is read once and serves all heads, as key and as value (absorbed MLA).

A program takes one row of the batch, BLOCK_M of its `HEADS * Q_LEN` queries and one of `splits` equal parts of the
tokens that these see. Scores are in units of log 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.ops.decoding.triton.kernels import (
    DEAD,
    NOWHERE,
    load_vectors,
    seen_keys,
    softmax_step,
    split_of,
    store_part,
)


@triton.jit(do_not_specialize=["length", "start", "kept", "back", "ahead", "splits", "table_width"])
def latent_kernel(
    Q, Q_ROPE,  # [B, HEADS, Q_LEN, RANK] and ROPE
    C, C_SCALE, C_OFFSET,  # latents [blocks, 1, size, RANK]; scales and offsets dense [blocks, 1, size]
    R, R_SCALE, R_OFFSET,  # rope keys [blocks, 1, size, ROPE], likewise
    RECENT_C, RECENT_R,  # [B, 1, recent_size, RANK] and ROPE, dense rings
    TABLE,  # [B, pages]
    LENGTHS, STARTS, KEPT,  # [B], or nothing where all rows are alike
    OUT,  # [B, HEADS, Q_LEN, RANK], dense
    PART, LSE,  # [B, HEADS, Q_LEN, splits, RANK] and [..., splits], fp32, dense
    length, start, kept,  # what all rows share
    back, ahead,  # query i sees token j iff -ahead <= i - j < back
    size, recent_size, table_width,
    q_batch, q_head, q_token,
    p_batch, p_head, p_token,  # strides of Q_ROPE
    c_block, c_token,
    r_block, r_token,
    scale, splits,
    HEADS: tl.constexpr, Q_LEN: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
    SPLIT: tl.constexpr, PAGE: tl.constexpr, RING: tl.constexpr, QUANT: tl.constexpr, RECENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One share of one tile of queries: see the top of the file."""
    i_tile, i_split, i_row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = i_row.to(tl.int64)
    if LENGTHS is not None:
        length += tl.load(LENGTHS + i_row).to(tl.int32)
    if STARTS is not None:
        start += tl.load(STARTS + i_row).to(tl.int32)
    if KEPT is not None:
        kept += tl.load(KEPT + i_row).to(tl.int32)

    m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M], a head and a query
    o_r, o_p = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    real = m < HEADS * Q_LEN
    query = start + m % Q_LEN  # positions
    b_query = tl.where(real & (query < length), query, NOWHERE)  # a query past the end of its row sees nothing
    q_at = row * q_batch + (m // Q_LEN).to(tl.int64) * q_head + (m % Q_LEN) * q_token
    p_at = row * p_batch + (m // Q_LEN).to(tl.int64) * p_head + (m % Q_LEN) * p_token
    b_q = load_vectors(Q, q_at, o_r, real, RANK, BLOCK_R)  # [BLOCK_M, BLOCK_R]
    b_qp = load_vectors(Q_ROPE, p_at, o_p, real, ROPE, BLOCK_P)  # [BLOCK_M, BLOCK_P]

    first, last = seen_keys(start, length, Q_LEN, back, ahead)
    if RING:
        first = tl.maximum(first, length - kept)
    if RECENT:
        fresh = tl.maximum(length - tl.minimum(kept, recent_size), 0)  # tokens from here on are in the ring
    else:
        fresh = length
    low, high = split_of(first, tl.minimum(last, fresh), i_split, splits, SPLIT, BLOCK_N)

    b_max = tl.full([BLOCK_M], DEAD, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if PAGE > 0:
        TABLE += row * table_width
    else:
        C += row * c_block
        R += row * r_block
        if QUANT > 0:
            C_SCALE += row * size
            R_SCALE += row * size
        if QUANT > 1:
            C_OFFSET += row * size
            R_OFFSET += row * size
    if QUANT > 1:
        b_qsum, b_qpsum = tl.sum(b_q.to(tl.float32), 1), tl.sum(b_qp.to(tl.float32), 1)

    for n0 in range(low, high, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)  # positions
        live = n < high
        if PAGE > 0:
            page = tl.load(TABLE + n // PAGE, mask=live, other=0).to(tl.int64)
            slot = n % PAGE
            c_at = page * c_block + slot * c_token
            r_at = page * r_block + slot * r_token
            s_at = page * size + slot
        else:
            if RING:
                slot = (n % size).to(tl.int64)
            else:
                slot = n.to(tl.int64)
            c_at = slot * c_token
            r_at = slot * r_token
            s_at = slot
        b_c = load_vectors(C, c_at, o_r, live, RANK, BLOCK_R).to(b_q.dtype)  # [BLOCK_N, BLOCK_R]
        b_r = load_vectors(R, r_at, o_p, live, ROPE, BLOCK_P).to(b_q.dtype)  # [BLOCK_N, BLOCK_P]
        if QUANT > 0:
            c_scale = tl.load(C_SCALE + s_at, mask=live, other=0.0)
            r_scale = tl.load(R_SCALE + s_at, mask=live, other=0.0)
            b_s = tl.dot(b_qp, tl.trans(b_r), input_precision=PRECISION) * r_scale[None, :]
            b_s += tl.dot(b_q, tl.trans(b_c), input_precision=PRECISION) * c_scale[None, :]
        else:
            b_s = tl.dot(b_qp, tl.trans(b_r), input_precision=PRECISION)
            b_s = tl.dot(b_q, tl.trans(b_c), b_s, input_precision=PRECISION)
        if QUANT > 1:
            c_offset = tl.load(C_OFFSET + s_at, mask=live, other=0.0)
            r_offset = tl.load(R_OFFSET + s_at, mask=live, other=0.0)
            b_s += b_qsum[:, None] * c_offset[None, :] + b_qpsum[:, None] * r_offset[None, :]
        b_p, b_max, b_sum, shrink = softmax_step(b_s, b_max, b_sum, b_query, n, live, back, ahead, scale, 0.0, False)
        b_acc *= shrink[:, None]
        if QUANT > 1:
            b_acc += tl.sum(b_p * c_offset[None, :], 1)[:, None]
        if QUANT > 0:
            if b_q.dtype == tl.float16:  # products with small scales would leave its range
                largest = tl.max(c_scale)
                b_p *= (c_scale / tl.where(largest > 0, largest, 1.0))[None, :]
                b_acc += largest * tl.dot(b_p.to(tl.float16), b_c)
            else:
                b_p *= c_scale[None, :]
                b_acc = tl.dot(b_p.to(b_q.dtype), b_c, b_acc, input_precision=PRECISION)
        else:
            b_acc = tl.dot(b_p.to(b_q.dtype), b_c, b_acc, input_precision=PRECISION)

    if RECENT:  # the last split reads the newest tokens too
        low = tl.where(i_split == splits - 1, tl.maximum(first, fresh), last)
        RECENT_C += row * recent_size * RANK
        RECENT_R += row * recent_size * ROPE
        for n0 in range(low, last, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            live = n < last
            slot = (n % recent_size).to(tl.int64)
            b_c = load_vectors(RECENT_C, slot * RANK, o_r, live, RANK, BLOCK_R)
            b_r = load_vectors(RECENT_R, slot * ROPE, o_p, live, ROPE, BLOCK_P)
            b_s = tl.dot(b_qp, tl.trans(b_r), input_precision=PRECISION)
            b_s = tl.dot(b_q, tl.trans(b_c), b_s, input_precision=PRECISION)
            b_p, b_max, b_sum, shrink = softmax_step(
                b_s, b_max, b_sum, b_query, n, live, back, ahead, scale, 0.0, False
            )
            b_acc = tl.dot(b_p.to(b_q.dtype), b_c, b_acc * shrink[:, None], input_precision=PRECISION)

    out_at = (row * HEADS + m // Q_LEN) * Q_LEN + m % Q_LEN
    store_part(b_acc, b_max, b_sum, OUT, PART, LSE, out_at, i_split, o_r, real, splits, SPLIT, RANK)
