"""Flash-decoding over latents: each is read once and serves all heads, as key and as value (absorbed MLA).

A program takes one row of the batch, BLOCK_M of its `HEADS * Q_LEN` queries and one of `splits` equal parts of the
tokens that these see.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.ops.decoding.triton.merging import merge_here
from attnzoo.ops.decoding.triton.tiles import (
    DEAD,
    NOWHERE,
    attend,
    hide,
    load_vectors,
    seen_keys,
    split_of,
    store_part,
    whole_tiles,
)


@triton.jit(do_not_specialize=["length", "start", "kept", "back", "ahead", "splits"])
def latent_kernel(
    Q, Q_ROPE,  # [B, HEADS, Q_LEN, RANK] and ROPE
    C, C_SCALE, C_OFFSET,  # latents [blocks, 1, size, RANK]; scales and offsets dense [blocks, 1, size]
    R, R_SCALE, R_OFFSET,  # rope keys [blocks, 1, size, ROPE], likewise
    RECENT_C, RECENT_R,  # [B, 1, recent_size, RANK] and ROPE, dense rings
    TABLE,  # [B, pages]
    LENGTHS, STARTS, KEPT,  # [B], or nothing where all rows are alike
    OUT,  # [B, HEADS, Q_LEN, RANK], dense
    PART,  # [B, HEADS, Q_LEN, splits, RANK], then logsumexps [..., splits], fp32, dense
    ARRIVED,  # [B, tiles of queries]: see `merge_here`
    length, start, kept,  # what all rows share
    back, ahead,  # query i sees token j iff -ahead <= i - j < back
    scale, splits,
    size, recent_size, table_width,
    q_batch, q_head, q_token,
    p_batch, p_head, p_token,  # strides of Q_ROPE
    c_block, c_token,
    r_block, r_token,
    HEADS: tl.constexpr, Q_LEN: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
    SPLIT: tl.constexpr, PAGE: tl.constexpr, RING: tl.constexpr, QUANT: tl.constexpr, RECENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    SHARE: tl.constexpr, MERGE_M: tl.constexpr, MERGE_S: tl.constexpr, MERGE_DV: tl.constexpr,
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
    q_at = row * q_batch + (m // Q_LEN).to(tl.int64) * q_head
    p_at = row * p_batch + (m // Q_LEN).to(tl.int64) * p_head
    b_q = load_vectors(Q, q_at, m % Q_LEN, q_token, o_r, real, RANK, BLOCK_R)  # [BLOCK_M, BLOCK_R]
    b_qp = load_vectors(Q_ROPE, p_at, m % Q_LEN, p_token, o_p, real, ROPE, BLOCK_P)  # [BLOCK_M, BLOCK_P]

    first, last = seen_keys(start, length, Q_LEN, back, ahead)
    if RING:
        first = tl.maximum(first, length - kept)
    if RECENT:
        fresh = tl.maximum(length - tl.minimum(kept, recent_size), 0)  # tokens from here on are in the ring
    else:
        fresh = length
    low, high = split_of(first, tl.minimum(last, fresh), i_split, splits, SPLIT, BLOCK_N)
    before, whole, total = whole_tiles(low, high, first, start, Q_LEN, back, ahead, BLOCK_N)

    b_max = tl.full([BLOCK_M], DEAD, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if QUANT == 0:
        c_scale, r_scale = None, None
    if QUANT < 2:
        c_offset, r_offset = None, None
    b_qsum = tl.sum(b_q.to(tl.float32), 1) if QUANT > 1 else None
    b_psum = tl.sum(b_qp.to(tl.float32), 1) if QUANT > 1 else None
    if PAGE > 0:
        TABLE += row * table_width
    else:
        block = row

    # Tiles that all queries see whole: no masks. Where a tile is one piece of memory, it has one base address.
    o_n = tl.arange(0, BLOCK_N)
    slot = o_n
    if PAGE > 0:
        o_page = 0  # from a tile's first position on
        if PAGE < BLOCK_N:
            o_page, slot = o_n, o_n % PAGE
        block = tl.load(TABLE + tl.minimum(low + before * BLOCK_N + o_page, high - 1) // PAGE, mask=whole > 0, other=0)
        block = block.to(tl.int64)
    for i_n in range(before, before + whole):
        n0 = low + i_n * BLOCK_N
        if RING:
            slot = (n0 + o_n) % size
            at = tl.zeros([], tl.int64)
        elif PAGE > 0:
            at = (n0 % PAGE if PAGE >= BLOCK_N else n0 * 0).to(tl.int64)
        else:
            at = n0.to(tl.int64)
        c_at, r_at, s_at = block * c_block + at * c_token, block * r_block + at * r_token, block * size + at
        if PAGE > 0:  # the next tile's pages, so that no tile waits for them
            block = tl.load(TABLE + tl.minimum(n0 + BLOCK_N + o_page, high - 1) // PAGE).to(tl.int64)
        b_r = load_vectors(R, r_at, slot, r_token, o_p, None, ROPE, BLOCK_P)  # [BLOCK_N, BLOCK_P]
        b_c = load_vectors(C, c_at, slot, c_token, o_r, None, RANK, BLOCK_R)  # [BLOCK_N, BLOCK_R]
        if QUANT > 0:
            c_scale, r_scale = tl.load(C_SCALE + s_at + slot), tl.load(R_SCALE + s_at + slot)
        if QUANT > 1:
            c_offset, r_offset = tl.load(C_OFFSET + s_at + slot), tl.load(R_OFFSET + s_at + slot)
        b_c = b_c.to(b_q.dtype)
        b_s = joint_scores(
            b_q, b_qp, b_c, b_r, c_scale, r_scale, c_offset, r_offset, b_qsum, b_psum, scale, QUANT, PRECISION
        )
        b_max, b_sum, b_acc = attend(b_s, b_c, c_scale, c_offset, b_max, b_sum, b_acc, b_q.dtype, QUANT, PRECISION)

    for i_n in tl.range(0, total - whole, num_stages=1):  # tiles at the edges
        n = low + tl.where(i_n < before, i_n, i_n + whole) * BLOCK_N + o_n
        live = (n >= first) & (n < high)
        if PAGE > 0:
            page, place = tl.load(TABLE + n // PAGE, mask=live, other=0).to(tl.int64), n % PAGE
            c_from, r_from, s_from = page * c_block, page * r_block, page * size
        else:
            place = (n % size if RING else n).to(tl.int64)
            c_from, r_from, s_from = row * c_block, row * r_block, row * size
        b_r = load_vectors(R, r_from, place, r_token, o_p, live, ROPE, BLOCK_P)
        b_c = load_vectors(C, c_from, place, c_token, o_r, live, RANK, BLOCK_R).to(b_q.dtype)
        if QUANT > 0:
            c_scale = tl.load(C_SCALE + s_from + place, mask=live, other=0.0)
            r_scale = tl.load(R_SCALE + s_from + place, mask=live, other=0.0)
        if QUANT > 1:
            c_offset = tl.load(C_OFFSET + s_from + place, mask=live, other=0.0)
            r_offset = tl.load(R_OFFSET + s_from + place, mask=live, other=0.0)
        b_s = joint_scores(
            b_q, b_qp, b_c, b_r, c_scale, r_scale, c_offset, r_offset, b_qsum, b_psum, scale, QUANT, PRECISION
        )
        b_s = hide(b_s, b_query, n, live, back, ahead)
        b_max, b_sum, b_acc = attend(b_s, b_c, c_scale, c_offset, b_max, b_sum, b_acc, b_q.dtype, QUANT, PRECISION)

    if RECENT:  # the last split reads the newest tokens too
        low = tl.where(i_split == splits - 1, tl.maximum(first, fresh), last)
        RECENT_C += row * recent_size * RANK
        RECENT_R += row * recent_size * ROPE
        for n0 in tl.range(low, last, BLOCK_N, num_stages=1):
            n = n0 + o_n
            live = n < last
            fresh_slot = n % recent_size
            b_r = load_vectors(RECENT_R, row * 0, fresh_slot, ROPE, o_p, live, ROPE, BLOCK_P)
            b_c = load_vectors(RECENT_C, row * 0, fresh_slot, RANK, o_r, live, RANK, BLOCK_R)
            b_s = joint_scores(b_q, b_qp, b_c, b_r, None, None, None, None, None, None, scale, 0, PRECISION)
            b_s = hide(b_s, b_query, n, live, back, ahead)
            b_max, b_sum, b_acc = attend(b_s, b_c, None, None, b_max, b_sum, b_acc, b_q.dtype, 0, PRECISION)

    b_sum = tl.where(b_query > NOWHERE, b_sum, 0.0)
    base = row * HEADS * Q_LEN
    LSE = None
    if SPLIT:
        LSE = PART + tl.num_programs(2).to(tl.int64) * HEADS * Q_LEN * splits * RANK
    store_part(b_acc, b_max, b_sum, OUT, PART, LSE, base + m, i_split, o_r, real, splits, SPLIT, RANK)
    if SPLIT:
        group = i_row * tl.num_programs(0) + i_tile
        merge_here(
            PART, LSE, None, OUT, ARRIVED, group, base, 0, i_tile * BLOCK_M, HEADS * Q_LEN, i_split, splits,
            Q_LEN, RANK, SHARE, BLOCK_M, MERGE_M, MERGE_S, MERGE_DV,
        )  # fmt: skip


@triton.jit
def joint_scores(
    b_q, b_qp, b_c, b_r, c_scale, r_scale, c_offset, r_offset, b_qsum, b_psum, scale,
    QUANT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores `[BLOCK_M, BLOCK_N]` of latents and rope keys together."""
    b_s = tl.dot(b_qp, tl.trans(b_r.to(b_qp.dtype)), input_precision=PRECISION)
    if QUANT > 0:
        b_s *= r_scale[None, :]
        b_s += tl.dot(b_q, tl.trans(b_c), input_precision=PRECISION) * c_scale[None, :]
    else:
        b_s = tl.dot(b_q, tl.trans(b_c), b_s, input_precision=PRECISION)
    if QUANT > 1:
        b_s += b_qsum[:, None] * c_offset[None, :] + b_psum[:, None] * r_offset[None, :]
    return b_s * scale
