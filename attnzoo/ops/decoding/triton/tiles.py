"""What the decoding kernels do with one tile of keys and values, and which tiles there are."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
DEAD = tl.constexpr(float("-inf"))
NOWHERE = tl.constexpr(-(2**30))  # position of a query that sees nothing


@triton.jit
def seen_keys(start, length, Q_LEN: tl.constexpr, back, ahead):
    """The keys `first, ..., last - 1` of a row that at least one of its queries may see."""
    first = tl.maximum(start - back + 1, 0)
    last = tl.minimum(length, tl.minimum(start + Q_LEN, length) + ahead)
    return first, last


@triton.jit
def before_window(seen, fresh, length, prefix):
    """The first place of a walk that takes the prefix's keys before those from `seen` on; and `fresh` as a place.

    A place from `seen` on is a key's own position. Those just before `seen` are keys 0, 1, ... of the prefix: no key is
    walked twice, and none that lies between.
    """
    count = tl.minimum(tl.minimum(prefix, seen), length)
    first = seen - count
    return first, tl.where(fresh < seen, first + tl.minimum(fresh, count), fresh)


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
def hide(b_s, b_query, n, live, back, ahead, prefix=None):
    """Scores with those of keys that are not seen dead."""
    distance = b_query[:, None] - n[None, :]
    if prefix is None:
        visible = live[None, :] & (distance < back)
    else:
        visible = live[None, :] & ((distance < back) | (n < prefix)[None, :])
    visible = visible & (distance >= -ahead) & (b_query > NOWHERE)[:, None]
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
def store_part(
    b_acc, b_max, b_sum, OUT, PART, LSE, out_at, i_split, o_dv, real, splits, SPLIT: tl.constexpr, DV: tl.constexpr
):  # fmt: skip
    """Write the result, or the split's share of it with its logsumexp."""
    seen = b_sum > 0
    b_acc = b_acc * tl.where(seen, 1 / tl.where(seen, b_sum, 1.0), 0.0)[:, None]
    mask = real[:, None] & (o_dv[None, :] < DV)
    if not SPLIT:
        tl.store(OUT + out_at[:, None] * DV + o_dv[None, :], b_acc.to(OUT.dtype.element_ty), mask=mask)
    else:
        part = out_at * splits + i_split
        tl.store(LSE + part, tl.where(seen, b_max + tl.log(tl.where(seen, b_sum, 1.0)), DEAD), mask=real)
        tl.store(PART + part[:, None] * DV + o_dv[None, :], b_acc, mask=mask)


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
