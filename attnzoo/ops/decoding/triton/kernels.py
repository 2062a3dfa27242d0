"""Flash-decoding: queries of a group in one tile, keys split over programs, every kind of cache read in place.

A program takes one row of the batch, one key/value head, up to BLOCK_M of the `GROUP * Q_LEN` queries that share it,
and one of `splits` equal parts of the keys that these queries see. What they find is merged by its logsumexp.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
DEAD = tl.constexpr(float("-inf"))
NOWHERE = tl.constexpr(-(2**30))  # position of a query that sees nothing


@triton.jit(do_not_specialize=["length", "start", "kept", "back", "ahead", "splits"])
def decode_kernel(
    Q,  # [B, Hk * GROUP, Q_LEN, D]
    K, K_SCALE, K_OFFSET,  # [blocks, Hk, size, D]; scales and offsets dense [blocks, Hk, size]
    V, V_SCALE, V_OFFSET,  # [blocks, Hk, size, DV]
    RECENT_K, RECENT_V,  # [B, Hk, recent_size, D] and DV, dense rings
    TABLE,  # [B, pages]
    LENGTHS, STARTS, KEPT,  # [B], or nothing where all rows are alike
    SINKS,  # [Hk * GROUP]
    OUT,  # [B, Hk * GROUP, Q_LEN, DV], dense
    PART, LSE,  # [B, Hk, GROUP * Q_LEN, splits, DV] and [..., splits], fp32, dense
    length, start, kept,  # what all rows share
    back, ahead,  # query i sees key j iff -ahead <= i - j < back
    scale, softcap, splits,
    size, recent_size, heads, k_heads, table_width,
    q_batch, q_head, q_token,
    k_block, k_head, k_token,
    v_block, v_head, v_token,
    GROUP: tl.constexpr, Q_LEN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    SPLIT: tl.constexpr, PAGE: tl.constexpr, RING: tl.constexpr, QUANT: tl.constexpr, RECENT: tl.constexpr,
    INTEGER: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    EARLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One share of one tile of queries: see the top of the file."""
    if EARLY and SPLIT:
        tl.extra.cuda.gdc_launch_dependents()  # the merge may be set up; it waits for the results itself
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
    low, high = split_of(first, tl.minimum(last, fresh), i_split, splits, SPLIT, BLOCK_N)
    before, whole, total = whole_tiles(low, high, first, start, Q_LEN, back, ahead, BLOCK_N)

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
        if PAGE > 0:
            page, place = tl.load(TABLE + n // PAGE, mask=live, other=0).to(tl.int64), n % PAGE
            k_from, v_from, s_from = page * k_block, page * v_block, page * s_block
        else:
            place = (n % size if RING else n).to(tl.int64)
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
            b_s = hide(b_s, b_query, n, live, back, ahead)
            b_max, b_sum, acc_0, acc_1, acc_2, acc_3 = integer_attend(
                b_s, b_v, v_scale, v_offset, b_max, b_sum, acc_0, acc_1, acc_2, acc_3, QUANT
            )
        else:
            b_v = load_vectors(V, v_from, place, v_token, o_dv, live, DV, BLOCK_DV)
            b_s = scores(b_q, b_k, k_scale, k_offset, b_qsum, scale, softcap, SOFTCAP, QUANT, PRECISION)
            b_s = hide(b_s, b_query, n, live, back, ahead)
            b_max, b_sum, b_acc = attend(b_s, b_v, v_scale, v_offset, b_max, b_sum, b_acc, b_q.dtype, QUANT, PRECISION)

    if INTEGER:
        b_acc = tl.interleave(tl.interleave(acc_0, acc_2), tl.interleave(acc_1, acc_3))
    if RECENT:  # the last split reads the newest tokens too
        low = tl.where(i_split == splits - 1, tl.maximum(first, fresh), last)
        RECENT_K += (row * k_heads + head) * recent_size * D
        RECENT_V += (row * k_heads + head) * recent_size * DV
        for n0 in range(low, last, 16):  # small tiles: these few tokens must not cost the other loops registers
            n = n0 + tl.arange(0, 16)
            live = n < last
            fresh_slot = n % recent_size
            b_k = load_vectors(RECENT_K, row * 0, fresh_slot, D, o_d, live, D, BLOCK_D)
            b_v = load_vectors(RECENT_V, row * 0, fresh_slot, DV, o_dv, live, DV, BLOCK_DV)
            b_s = scores(b_q, b_k, None, None, None, scale, softcap, SOFTCAP, 0, PRECISION)
            b_s = hide(b_s, b_query, n, live, back, ahead)
            b_max, b_sum, b_acc = attend(b_s, b_v, None, None, b_max, b_sum, b_acc, b_q.dtype, 0, PRECISION)

    b_sum = tl.where(b_query > NOWHERE, b_sum, 0.0)
    head_at = i_head * GROUP + m // Q_LEN
    out_at = (row * heads + head_at) * Q_LEN + m % Q_LEN
    if not SPLIT and SINKS is not None:
        sink = tl.load(SINKS + head_at, mask=real, other=DEAD).to(tl.float32)
        b_sum += tl.where(b_sum > 0, tl.exp2((sink - b_max) * LOG2E), 0.0)
    store_part(b_acc, b_max, b_sum, OUT, PART, LSE, out_at, i_split, o_dv, real, splits, SPLIT, DV)


@triton.jit
def seen_keys(start, length, Q_LEN: tl.constexpr, back, ahead):
    """The keys `first, ..., last - 1` of a row that at least one of its queries may see."""
    first = tl.maximum(start - back + 1, 0)
    last = tl.minimum(length, tl.minimum(start + Q_LEN, length) + ahead)
    return first, last


@triton.jit
def split_of(first, last, i_split, splits, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr):
    """The part of the keys that split `i_split` walks; tiles begin at multiples of BLOCK_N."""
    low = first // BLOCK_N * BLOCK_N
    high = last
    if SPLIT:
        each = tl.cdiv(tl.cdiv(tl.maximum(last - low, 0), splits), BLOCK_N) * BLOCK_N
        low += i_split * each
        high = tl.minimum(low + each, last)
    return low, high


@triton.jit
def whole_tiles(low, high, first, start, Q_LEN: tl.constexpr, back, ahead, BLOCK_N: tl.constexpr):
    """Tiles of `low, ..., high - 1`: how many precede those that all queries see whole, how many these are, all."""
    total = tl.cdiv(tl.maximum(high - low, 0), BLOCK_N)
    seen_low = tl.maximum(first, start + Q_LEN - back)
    seen_high = tl.minimum(high, start + ahead + 1)
    before = tl.minimum(tl.cdiv(tl.maximum(seen_low - low, 0), BLOCK_N), total)
    whole = tl.maximum(tl.maximum(seen_high - low, 0) // BLOCK_N - before, 0)
    return before, whole, total


@triton.jit
def load_vectors(BASE, at, slot, stride, o_d, live, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Vectors `[BLOCK_N, BLOCK_D]` at `at + slot * stride`; zeros where there is no token or no dimension.

    `at` is one number or `[BLOCK_N]`, `live [BLOCK_N]` says where there is a token; None: everywhere.
    """
    if len(at.shape) > 0:
        rows = BASE + (at + slot * stride)[:, None] + o_d[None, :]
    else:
        rows = (BASE + at) + ((slot * stride)[:, None] + o_d[None, :])
    if live is None and BLOCK_D == D:
        vectors = tl.load(rows)
    elif live is None:
        vectors = tl.load(rows, mask=(o_d < D)[None, :], other=0.0)
    elif BLOCK_D == D:
        vectors = tl.load(rows, mask=live[:, None], other=0.0)
    else:
        vectors = tl.load(rows, mask=live[:, None] & (o_d < D)[None, :], other=0.0)
    return vectors


@triton.jit
def scores(
    b_q, b_k, k_scale, k_offset, b_qsum, scale, softcap,
    SOFTCAP: tl.constexpr, QUANT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores `[BLOCK_M, BLOCK_N]`."""
    b_s = tl.dot(b_q, tl.trans(b_k.to(b_q.dtype)), input_precision=PRECISION)
    if QUANT > 1:
        b_s = b_s * k_scale[None, :] + b_qsum[:, None] * k_offset[None, :]
    elif QUANT > 0 and SOFTCAP:
        b_s = b_s * k_scale[None, :]
    if SOFTCAP:
        b_s = softcap * tanh(b_s * (scale / softcap))
    elif QUANT == 1:
        b_s = b_s * (k_scale * scale)[None, :]
    else:
        b_s = b_s * scale
    return b_s


@triton.jit
def hide(b_s, b_query, n, live, back, ahead):
    """Scores with those of keys that are not seen dead."""
    distance = b_query[:, None] - n[None, :]
    visible = live[None, :] & (distance < back) & (distance >= -ahead) & (b_query > NOWHERE)[:, None]
    return tl.where(visible, b_s, DEAD)


@triton.jit
def soften(b_s, b_max, b_sum):
    """A step of the running softmax: weights `[BLOCK_M, BLOCK_N]`, new maxima and sums, factor of what came before."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_safe = tl.where(b_new == DEAD, 0.0, b_new)
    b_p = tl.exp2((b_s - b_safe[:, None]) * LOG2E)
    shrink = tl.exp2((b_max - b_safe) * LOG2E)
    return b_p, b_new, b_sum * shrink + tl.sum(b_p, 1), shrink


@triton.jit
def attend(
    b_s, b_v, v_scale, v_offset, b_max, b_sum, b_acc, dtype: tl.constexpr, QUANT: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The running maxima, sums and outputs after one more tile."""
    b_p, b_max, b_sum, shrink = soften(b_s, b_max, b_sum)
    b_acc *= shrink[:, None]
    if QUANT > 1:
        b_acc += tl.sum(b_p * v_offset[None, :], 1)[:, None]
    if QUANT > 0:
        if dtype == tl.float16:  # products with small scales would leave its range
            largest = tl.max(v_scale)
            b_p *= (v_scale / tl.where(largest > 0, largest, 1.0))[None, :]
            b_acc += largest * tl.dot(b_p.to(dtype), b_v.to(dtype))
        else:
            b_p *= v_scale[None, :]
            b_acc = tl.dot(b_p.to(dtype), b_v.to(dtype), b_acc, input_precision=PRECISION)
    else:
        b_acc = tl.dot(b_p.to(dtype), b_v, b_acc, input_precision=PRECISION)
    return b_max, b_sum, b_acc


@triton.jit
def halves(x):
    """Numbers `[M, N]` of at most 16256, rounded, as int8 `[2 * M, N]`: `128 * high + low`, first all high parts."""
    whole = (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000  # 1.5 * 2**23 leaves the integer in the last bits
    high = (whole + 64) >> 7
    # Chosen, not joined and permuted: the latter would leave columns in order, which are read back byte by byte.
    both = tl.where((tl.arange(0, 2) == 0)[:, None, None], high[None, :, :], (whole - (high << 7))[None, :, :])
    return tl.reshape(both.to(tl.int8), (2 * x.shape[0], x.shape[1]))


@triton.jit
def joined(x):
    """What products with `halves` are worth: `[2 * M, N]` to fp32 `[M, N]`."""
    parts = tl.reshape(x, (2, x.shape[0] // 2, x.shape[1]))
    weights = tl.where(tl.arange(0, 2) == 0, 128, 1)
    return tl.sum(parts * weights[:, None, None], 0).to(tl.float32)


@triton.jit
def halves_of_queries(b_q):
    """Queries `[BLOCK_M, D]` as two int8, to 15 bits of each query's largest number, and the unit of these."""
    largest = tl.max(tl.abs(b_q.to(tl.float32)), 1)
    unit = tl.where(largest > 0, largest, 1.0) / 16256.0
    return halves(b_q.to(tl.float32) / unit[:, None]), unit


@triton.jit
def load_words(BASE, at, slot, stride, live, DV: tl.constexpr):
    """Codes `[BLOCK_N, DV]` four to a word, `[BLOCK_N, DV / 4]` int32."""
    WORDS: tl.constexpr = DV // 4
    words = BASE.to(tl.pointer_type(tl.int32))
    return load_vectors(words, at // 4, slot, stride // 4, tl.arange(0, WORDS), live, WORDS, WORDS)


@triton.jit
def integer_scores(
    b_halves, b_unit, b_k, k_scale, k_offset, b_qsum, scale, softcap, SOFTCAP: tl.constexpr, QUANT: tl.constexpr
):  # fmt: skip
    """Scores from codes as they are: no key is converted."""
    whole = joined(tl.dot(b_halves, tl.trans(b_k), out_dtype=tl.int32))
    if SOFTCAP or QUANT > 1:
        b_s = whole * b_unit[:, None] * k_scale[None, :]
        if QUANT > 1:
            b_s += b_qsum[:, None] * k_offset[None, :]
        if SOFTCAP:
            b_s = softcap * tanh(b_s * (scale / softcap))
        else:
            b_s *= scale
    else:
        b_s = whole * (b_unit * scale)[:, None] * k_scale[None, :]
    return b_s


@triton.jit
def integer_attend(
    b_s, b_v, v_scale, v_offset, b_max, b_sum, acc_0, acc_1, acc_2, acc_3, QUANT: tl.constexpr
):  # fmt: skip
    """As `attend`, with weights in two int8 and the codes of values as they are, four to a word of `b_v`."""
    b_here = tl.max(b_s, 1)  # weights are cut to 15 bits of the largest of this tile
    b_new = tl.maximum(b_max, b_here)
    b_safe = tl.where(b_new == DEAD, 0.0, b_new)
    b_base = tl.where(b_here == DEAD, 0.0, b_here)
    b_p = tl.exp2((b_s - b_base[:, None]) * LOG2E)
    shrink, share = tl.exp2((b_max - b_safe) * LOG2E), tl.exp2((b_here - b_safe) * LOG2E)
    b_sum = b_sum * shrink + tl.sum(b_p, 1) * share
    largest = tl.max(v_scale)
    largest = tl.where(largest > 0, largest, 1.0)
    b_halves = halves(b_p * (v_scale * (16256.0 / largest))[None, :])
    unit = (share * (largest / 16256.0))[:, None]
    shrink = shrink[:, None]
    acc_0 = acc_0 * shrink + weigh(b_halves, b_v, 0) * unit
    acc_1 = acc_1 * shrink + weigh(b_halves, b_v, 8) * unit
    acc_2 = acc_2 * shrink + weigh(b_halves, b_v, 16) * unit
    acc_3 = acc_3 * shrink + weigh(b_halves, b_v, 24) * unit
    if QUANT > 1:
        extra = (tl.sum(b_p * v_offset[None, :], 1) * share)[:, None]
        acc_0, acc_1, acc_2, acc_3 = acc_0 + extra, acc_1 + extra, acc_2 + extra, acc_3 + extra
    return b_new, b_sum, acc_0, acc_1, acc_2, acc_3


@triton.jit
def weigh(b_halves, b_v, SHIFT: tl.constexpr):
    """Weighted sums of one code of each word."""
    return joined(tl.dot(b_halves, (b_v >> SHIFT).to(tl.int8), out_dtype=tl.int32))


@triton.jit
def tanh(x):
    """Hyperbolic tangent to fp32's last digits: a series near 0, where the quotient cancels."""
    a = tl.abs(x)
    e = tl.exp2(a * (-2 * LOG2E))
    far = (1 - e) / (1 + e)
    s = a * a
    near = a * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    t = tl.where(a < 0.25, near, far)
    return tl.where(x < 0, -t, t)


@triton.jit
def store_part(
    b_acc, b_max, b_sum, OUT, PART, LSE, out_at, i_split, o_dv, real, splits, SPLIT: tl.constexpr, DV: tl.constexpr
):  # fmt: skip
    """Write the result, or the split's share of it with its logsumexp; a share without keys is not written."""
    seen = b_sum > 0
    b_acc = b_acc * tl.where(seen, 1 / tl.where(seen, b_sum, 1.0), 0.0)[:, None]
    mask = real[:, None] & (o_dv[None, :] < DV)
    if not SPLIT:
        tl.store(OUT + out_at[:, None] * DV + o_dv[None, :], b_acc.to(OUT.dtype.element_ty), mask=mask)
    else:
        part = out_at * splits + i_split
        tl.store(LSE + part, tl.where(seen, b_max + tl.log(tl.where(seen, b_sum, 1.0)), DEAD), mask=real)
        tl.store(PART + part[:, None] * DV + o_dv[None, :], b_acc, mask=mask & seen[:, None])


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    PART, LSE, SINKS, OUT,  # [rows, splits, DV], [rows, splits], [heads], [rows, DV]; a row is a query of a head
    splits, heads,
    Q_LEN: tl.constexpr, DV: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one query: their shares weighted by their logsumexp."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    i_row = tl.program_id(0).to(tl.int64)
    o_s, o_dv = tl.arange(0, BLOCK_S), tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    b_lse = tl.load(LSE + i_row * splits + o_s, mask=o_s < splits, other=DEAD)
    top = tl.max(b_lse, 0)
    top = tl.where(top == DEAD, 0.0, top)
    b_w = tl.exp2((b_lse - top) * LOG2E)
    total = tl.sum(b_w, 0)
    if SINKS is not None:
        sink = tl.load(SINKS + (i_row // Q_LEN) % heads).to(tl.float32)
        total += tl.where(total > 0, tl.exp2((sink - top) * LOG2E), 0.0)
    b_part = tl.load(
        PART + (i_row * splits + o_s)[:, None] * DV + o_dv[None, :],
        mask=(b_w > 0)[:, None] & (o_dv[None, :] < DV),
        other=0.0,
    )
    b_out = tl.sum(b_part * b_w[:, None], 0) * tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(OUT + i_row * DV + o_dv, b_out.to(OUT.dtype.element_ty), mask=o_dv < DV)
