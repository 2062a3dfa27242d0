"""Flash-decoding: queries of a group in one tile, keys split over programs, every kind of cache read in place.

A program takes one row of the batch, one key/value head, up to BLOCK_M of the `GROUP * Q_LEN` queries that share it,
and one of `splits` equal parts of the keys that these queries see. What they find is merged by its logsumexp.
All scores are in units of log 2, so that every exponential is one `exp2`.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
DEAD = tl.constexpr(float("-inf"))
NOWHERE = tl.constexpr(-(2**30))  # position of a query that sees nothing


@triton.jit(do_not_specialize=["length", "start", "kept", "back", "ahead", "splits", "table_width"])
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
    size, recent_size, heads, k_heads, table_width,
    q_batch, q_head, q_token,
    k_block, k_head, k_token,
    v_block, v_head, v_token,
    scale, softcap, splits,
    GROUP: tl.constexpr, Q_LEN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    SPLIT: tl.constexpr, PAGE: tl.constexpr, RING: tl.constexpr, QUANT: tl.constexpr, RECENT: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
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
    low, high = split_of(first, tl.minimum(last, fresh), i_split, splits, SPLIT, BLOCK_N)

    b_max = tl.full([BLOCK_M], DEAD, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    head = i_head.to(tl.int64)
    if PAGE > 0:
        K += head * k_head
        V += head * v_head
        TABLE += row * table_width
    else:
        K += row * k_block + head * k_head
        V += row * v_block + head * v_head
    s_block = k_heads * size  # scales are dense
    if QUANT > 0:
        s_base = head * size
        if PAGE == 0:
            s_base += row * s_block
        K_SCALE += s_base
        V_SCALE += s_base
    if QUANT > 1:
        K_OFFSET += s_base
        V_OFFSET += s_base
        b_qsum = tl.sum(b_q.to(tl.float32), 1)

    for n0 in range(low, high, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)  # positions
        live = n < high
        if PAGE > 0:
            page = tl.load(TABLE + n // PAGE, mask=live, other=0).to(tl.int64)
            slot = n % PAGE
            k_at = page * k_block + slot * k_token
            v_at = page * v_block + slot * v_token
            s_at = page * s_block + slot
        else:
            if RING:
                slot = (n % size).to(tl.int64)
            else:
                slot = n.to(tl.int64)
            k_at = slot * k_token
            v_at = slot * v_token
            s_at = slot
        b_k = load_vectors(K, k_at, o_d, live, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_s = tl.dot(b_q, tl.trans(b_k.to(b_q.dtype)), input_precision=PRECISION)
        if QUANT > 0:
            b_s *= tl.load(K_SCALE + s_at, mask=live, other=0.0)[None, :]
        if QUANT > 1:
            b_s += b_qsum[:, None] * tl.load(K_OFFSET + s_at, mask=live, other=0.0)[None, :]
        b_p, b_max, b_sum, shrink = softmax_step(
            b_s, b_max, b_sum, b_query, n, live, back, ahead, scale, softcap, SOFTCAP
        )
        b_v = load_vectors(V, v_at, o_dv, live, DV, BLOCK_DV)
        b_acc *= shrink[:, None]
        if QUANT > 1:
            b_acc += tl.sum(b_p * tl.load(V_OFFSET + s_at, mask=live, other=0.0)[None, :], 1)[:, None]
        if QUANT > 0:
            v_scale = tl.load(V_SCALE + s_at, mask=live, other=0.0)
            if b_q.dtype == tl.float16:  # products with small scales would leave its range
                largest = tl.max(v_scale)
                b_p *= (v_scale / tl.where(largest > 0, largest, 1.0))[None, :]
                b_acc += largest * tl.dot(b_p.to(tl.float16), b_v.to(tl.float16))
            else:
                b_p *= v_scale[None, :]
                b_acc = tl.dot(b_p.to(b_q.dtype), b_v.to(b_q.dtype), b_acc, input_precision=PRECISION)
        else:
            b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)

    if RECENT:  # the last split reads the newest tokens too
        low = tl.where(i_split == splits - 1, tl.maximum(first, fresh), last)
        RECENT_K += (row * k_heads + head) * recent_size * D
        RECENT_V += (row * k_heads + head) * recent_size * DV
        for n0 in range(low, last, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            live = n < last
            slot = (n % recent_size).to(tl.int64)
            b_k = load_vectors(RECENT_K, slot * D, o_d, live, D, BLOCK_D)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            b_p, b_max, b_sum, shrink = softmax_step(
                b_s, b_max, b_sum, b_query, n, live, back, ahead, scale, softcap, SOFTCAP
            )
            b_v = load_vectors(RECENT_V, slot * DV, o_dv, live, DV, BLOCK_DV)
            b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * shrink[:, None], input_precision=PRECISION)

    head_at = i_head * GROUP + m // Q_LEN
    out_at = (row * heads + head_at) * Q_LEN + m % Q_LEN
    if not SPLIT and SINKS is not None:
        sink = tl.load(SINKS + head_at, mask=real, other=DEAD).to(tl.float32) * LOG2E
        b_sum += tl.where(b_sum > 0, tl.exp2(sink - b_max), 0.0)
    store_part(b_acc, b_max, b_sum, OUT, PART, LSE, out_at, i_split, o_dv, real, splits, SPLIT, DV)


@triton.jit
def seen_keys(start, length, Q_LEN: tl.constexpr, back, ahead):
    """The keys `first, ..., last - 1` of a row that at least one of its queries may see."""
    first = tl.maximum(start - back + 1, 0)
    last = tl.minimum(length, tl.minimum(start + Q_LEN, length) + ahead)
    return first, last


@triton.jit
def split_of(first, last, i_split, splits, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr):
    """The part of the keys that split `i_split` walks, in whole tiles."""
    if not SPLIT:
        return first, last
    each = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), splits), BLOCK_N) * BLOCK_N
    low = first + i_split * each
    return low, tl.minimum(low + each, last)


@triton.jit
def load_vectors(BASE, at, o_d, live, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Vectors `[BLOCK_N, BLOCK_D]` that begin at the offsets `at`; zeros where there is no token or no dimension."""
    if BLOCK_D == D:
        mask = live[:, None]
    else:
        mask = live[:, None] & (o_d[None, :] < D)
    return tl.load(BASE + at[:, None] + o_d[None, :], mask=mask, other=0.0)


@triton.jit
def softmax_step(b_s, b_max, b_sum, b_query, n, live, back, ahead, scale, softcap, SOFTCAP: tl.constexpr):
    """A step of the running softmax: weights `[BLOCK_M, BLOCK_N]`, new maxima and sums, factor of what came before."""
    if SOFTCAP:
        b_s = softcap * LOG2E * tanh(b_s * (scale / softcap))
    else:
        b_s = b_s * (scale * LOG2E)
    distance = b_query[:, None] - n[None, :]
    visible = live[None, :] & (distance < back) & (distance >= -ahead) & (b_query > NOWHERE)[:, None]
    b_s = tl.where(visible, b_s, DEAD)
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_safe = tl.where(b_new == DEAD, 0.0, b_new)
    b_p = tl.exp2(b_s - b_safe[:, None])
    shrink = tl.exp2(b_max - b_safe)
    return b_p, b_new, b_sum * shrink + tl.sum(b_p, 1), shrink


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
        tl.store(LSE + part, tl.where(seen, b_max + tl.log2(tl.where(seen, b_sum, 1.0)), DEAD), mask=real)
        tl.store(PART + part[:, None] * DV + o_dv[None, :], b_acc, mask=mask & seen[:, None])


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    PART, LSE, SINKS, OUT,  # [rows, splits, DV], [rows, splits], [heads], [rows, DV]; a row is a query of a head
    splits, heads, Q_LEN: tl.constexpr, DV: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one query: their shares weighted by their logsumexp."""
    i_row = tl.program_id(0).to(tl.int64)
    o_s, o_dv = tl.arange(0, BLOCK_S), tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    b_lse = tl.load(LSE + i_row * splits + o_s, mask=o_s < splits, other=DEAD)
    top = tl.max(b_lse, 0)
    top = tl.where(top == DEAD, 0.0, top)
    b_w = tl.exp2(b_lse - top)
    total = tl.sum(b_w, 0)
    if SINKS is not None:
        sink = tl.load(SINKS + (i_row // Q_LEN) % heads).to(tl.float32) * LOG2E
        total += tl.where(total > 0, tl.exp2(sink - top), 0.0)
    b_part = tl.load(
        PART + (i_row * splits + o_s)[:, None] * DV + o_dv[None, :],
        mask=(b_w > 0)[:, None] & (o_dv[None, :] < DV),
        other=0.0,
    )
    b_out = tl.sum(b_part * b_w[:, None], 0) * tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(OUT + i_row * DV + o_dv, b_out.to(OUT.dtype.element_ty), mask=o_dv < DV)
