"""Flash-decoding: queries of a group in one tile, keys split over programs, every kind of cache read in place.

A program takes one row of the batch, one key/value head, up to BLOCK_M of the `GROUP * Q_LEN` queries that share it,
and one of `splits` equal parts of the keys that these queries see. What they find is merged by its logsumexp, by the
programs themselves.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.ops.decoding.triton.integers import halves_of_queries, integer_attend, integer_scores, load_words
from attnzoo.ops.decoding.triton.merging import merge_here
from attnzoo.ops.decoding.triton.tiles import (
    DEAD,
    LOG2E,
    NOWHERE,
    attend,
    before_window,
    hide,
    load_vectors,
    scores,
    seen_keys,
    split_of,
    store_part,
    whole_tiles,
)


@triton.jit(do_not_specialize=["length", "start", "kept", "back", "ahead", "prefix", "splits"])
def decode_kernel(
    Q,  # [B, Hk * GROUP, Q_LEN, D]
    K, K_SCALE, K_OFFSET,  # [blocks, Hk, size, D]; scales and offsets dense [blocks, Hk, size]
    V, V_SCALE, V_OFFSET,  # [blocks, Hk, size, DV]
    RECENT_K, RECENT_V,  # [B, Hk, recent_size, D] and DV, dense rings
    TABLE,  # [B, pages]
    LENGTHS, STARTS, KEPT,  # [B], or nothing where all rows are alike
    SINKS,  # [Hk * GROUP]
    OUT,  # [B, Hk * GROUP, Q_LEN, DV], dense
    PART,  # [B, Hk, GROUP * Q_LEN, splits, DV], then logsumexps [..., splits], fp32, dense
    ARRIVED,  # [B, programs of one split]: see `merge_here`
    length, start, kept,  # what all rows share
    back, ahead,  # query i sees key j iff -ahead <= i - j < back
    prefix,  # or j < prefix and j <= i; None: there is no such thing
    scale, softcap, splits,
    size, recent_size, heads, k_heads, table_width,
    q_batch, q_head, q_token,
    k_block, k_head, k_token,
    v_block, v_head, v_token,
    GROUP: tl.constexpr, Q_LEN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    SPLIT: tl.constexpr, PAGE: tl.constexpr, RING: tl.constexpr, QUANT: tl.constexpr, RECENT: tl.constexpr,
    INTEGER: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SHARE: tl.constexpr, MERGE_M: tl.constexpr, MERGE_S: tl.constexpr, MERGE_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One share of one tile of queries: see the top of the file."""
    i_split, i_head, i_row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_tile, i_head = i_head // k_heads, i_head % k_heads
    row = i_row.to(tl.int64)
    if LENGTHS is not None:
        length += tl.load(LENGTHS + i_row).to(tl.int32)
    if STARTS is not None:
        start += tl.load(STARTS + i_row).to(tl.int32)
    if KEPT is not None:
        kept += tl.load(KEPT + i_row).to(tl.int32)

    m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M], a head of the group and a query
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    real = m < GROUP * Q_LEN
    query = start + m % Q_LEN  # positions
    b_query = tl.where(real & (query < length), query, NOWHERE)  # a query past the end of its row sees nothing
    q_at = (i_head * GROUP + m // Q_LEN).to(tl.int64) * q_head + (m % Q_LEN) * q_token
    b_q = tl.load(
        Q + row * q_batch + q_at[:, None] + o_d[None, :], mask=real[:, None] & (o_d[None, :] < D), other=0.0
    )  # [BLOCK_M, BLOCK_D]

    first, last = seen_keys(start, length, Q_LEN, back, ahead)
    if RING:
        first = tl.maximum(first, length - kept)
    if RECENT:
        fresh = tl.maximum(length - tl.minimum(kept, recent_size), 0)  # tokens from here on are in the ring
    else:
        fresh = length
    seen = first
    if prefix is not None:
        first, fresh = before_window(seen, fresh, length, prefix)
    low, high = split_of(first, tl.minimum(last, fresh), i_split, splits, SPLIT, BLOCK_N)
    before, whole, total = whole_tiles(low, high, seen, start, Q_LEN, back, ahead, BLOCK_N)

    b_max = tl.full([BLOCK_M], DEAD, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    b_qsum = tl.sum(b_q.to(tl.float32), 1) if QUANT > 1 else None
    if INTEGER:
        b_halves, b_unit = halves_of_queries(b_q)
        acc_0 = tl.zeros([BLOCK_M, DV // 4], tl.float32)
        acc_1, acc_2, acc_3 = acc_0, acc_0, acc_0
    head = i_head.to(tl.int64)
    K += head * k_head
    V += head * v_head
    s_block = k_heads * size  # scales are dense
    if PAGE > 0:
        TABLE += row * table_width
    else:
        block = row
    if QUANT == 0:
        k_scale, v_scale = None, None
    if QUANT < 2:
        k_offset, v_offset = None, None
    if QUANT > 0:
        K_SCALE += head * size
        V_SCALE += head * size
    if QUANT > 1:
        K_OFFSET += head * size
        V_OFFSET += head * size

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
        k_at, v_at, s_at = block * k_block + at * k_token, block * v_block + at * v_token, block * s_block + at
        if PAGE > 0:  # the next tile's pages, so that no tile waits for them
            block = tl.load(TABLE + tl.minimum(n0 + BLOCK_N + o_page, high - 1) // PAGE).to(tl.int64)
        b_k = load_vectors(K, k_at, slot, k_token, o_d, None, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        if QUANT > 0:
            k_scale, v_scale = tl.load(K_SCALE + s_at + slot), tl.load(V_SCALE + s_at + slot)
        if QUANT > 1:
            k_offset, v_offset = tl.load(K_OFFSET + s_at + slot), tl.load(V_OFFSET + s_at + slot)
        if INTEGER:
            b_v = load_words(V, v_at, slot, v_token, None, DV)  # [BLOCK_N, DV / 4]
            b_s = integer_scores(b_halves, b_unit, b_k, k_scale, k_offset, b_qsum, scale, softcap, SOFTCAP, QUANT)
            b_max, b_sum, acc_0, acc_1, acc_2, acc_3 = integer_attend(
                b_s, b_v, v_scale, v_offset, b_max, b_sum, acc_0, acc_1, acc_2, acc_3, QUANT
            )
        else:
            b_v = load_vectors(V, v_at, slot, v_token, o_dv, None, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
            b_s = scores(b_q, b_k, k_scale, k_offset, b_qsum, scale, softcap, SOFTCAP, QUANT, PRECISION)
            b_max, b_sum, b_acc = attend(b_s, b_v, v_scale, v_offset, b_max, b_sum, b_acc, b_q.dtype, QUANT, PRECISION)

    for i_n in tl.range(0, total - whole, num_stages=1):  # tiles at the edges
        n = low + tl.where(i_n < before, i_n, i_n + whole) * BLOCK_N + o_n
        live = (n >= first) & (n < high)
        if prefix is not None:
            early = n < seen
            n = tl.where(early, n - first, n)
        if PAGE > 0:
            page, place = tl.load(TABLE + n // PAGE, mask=live, other=0).to(tl.int64), n % PAGE
            k_from, v_from, s_from = page * k_block, page * v_block, page * s_block
        else:
            place = (n % size if RING else n).to(tl.int64)
            if RING and prefix is not None:
                place = tl.where(early, size + n, place)
            k_from, v_from, s_from = row * k_block, row * v_block, row * s_block
        b_k = load_vectors(K, k_from, place, k_token, o_d, live, D, BLOCK_D)
        if QUANT > 0:
            k_scale = tl.load(K_SCALE + s_from + place, mask=live, other=0.0)
            v_scale = tl.load(V_SCALE + s_from + place, mask=live, other=0.0)
        if QUANT > 1:
            k_offset = tl.load(K_OFFSET + s_from + place, mask=live, other=0.0)
            v_offset = tl.load(V_OFFSET + s_from + place, mask=live, other=0.0)
        if INTEGER:
            b_v = load_words(V, v_from, place, v_token, live, DV)
            b_s = integer_scores(b_halves, b_unit, b_k, k_scale, k_offset, b_qsum, scale, softcap, SOFTCAP, QUANT)
            b_s = hide(b_s, b_query, n, live, back, ahead, prefix)
            b_max, b_sum, acc_0, acc_1, acc_2, acc_3 = integer_attend(
                b_s, b_v, v_scale, v_offset, b_max, b_sum, acc_0, acc_1, acc_2, acc_3, QUANT
            )
        else:
            b_v = load_vectors(V, v_from, place, v_token, o_dv, live, DV, BLOCK_DV)
            b_s = scores(b_q, b_k, k_scale, k_offset, b_qsum, scale, softcap, SOFTCAP, QUANT, PRECISION)
            b_s = hide(b_s, b_query, n, live, back, ahead, prefix)
            b_max, b_sum, b_acc = attend(b_s, b_v, v_scale, v_offset, b_max, b_sum, b_acc, b_q.dtype, QUANT, PRECISION)

    if INTEGER:
        b_acc = tl.interleave(tl.interleave(acc_0, acc_2), tl.interleave(acc_1, acc_3))
    if RECENT:  # each split reads some of the newest tokens too
        newest = tl.maximum(first, fresh)
        each = tl.cdiv(tl.cdiv(tl.maximum(last - newest, 0), splits), 16) * 16
        low = newest + i_split * each
        high = tl.minimum(low + each, last)
        RECENT_K += (row * k_heads + head) * recent_size * D
        RECENT_V += (row * k_heads + head) * recent_size * DV
        for n0 in range(low, high, 16):  # small tiles: these few tokens must not cost the other loops registers
            n = n0 + tl.arange(0, 16)
            live = n < high
            if prefix is not None:
                n = tl.where(n < seen, n - first, n)
            fresh_slot = n % recent_size
            b_k = load_vectors(RECENT_K, row * 0, fresh_slot, D, o_d, live, D, BLOCK_D)
            b_v = load_vectors(RECENT_V, row * 0, fresh_slot, DV, o_dv, live, DV, BLOCK_DV)
            b_s = scores(b_q, b_k, None, None, None, scale, softcap, SOFTCAP, 0, PRECISION)
            b_s = hide(b_s, b_query, n, live, back, ahead, prefix)
            b_max, b_sum, b_acc = attend(b_s, b_v, None, None, b_max, b_sum, b_acc, b_q.dtype, 0, PRECISION)

    b_sum = tl.where(b_query > NOWHERE, b_sum, 0.0)
    head_at = i_head * GROUP + m // Q_LEN
    base = (row * heads + i_head * GROUP) * Q_LEN
    if not SPLIT and SINKS is not None:
        sink = tl.load(SINKS + head_at, mask=real, other=DEAD).to(tl.float32)
        b_sum += tl.where(b_sum > 0, tl.exp2((sink - b_max) * LOG2E), 0.0)
    LSE = None
    if SPLIT:
        LSE = PART + tl.num_programs(2).to(tl.int64) * heads * Q_LEN * splits * DV
    store_part(b_acc, b_max, b_sum, OUT, PART, LSE, base + m, i_split, o_dv, real, splits, SPLIT, DV)
    if SPLIT:
        group = i_row * tl.num_programs(1) + tl.program_id(1)
        merge_here(
            PART, LSE, SINKS, OUT, ARRIVED, group, base, i_head * GROUP, i_tile * BLOCK_M, GROUP * Q_LEN, i_split,
            splits, Q_LEN, DV, SHARE, BLOCK_M, MERGE_M, MERGE_S, MERGE_DV,
        )  # fmt: skip
