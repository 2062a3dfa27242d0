"""Products of int8 codes as they are, on the integer units.

Queries and attention weights are written as two int8 each, `unit * (128 * high + low)`, which keeps 15 bits: more than
bf16 has. Codes of values are loaded four to a word, so that no byte is read alone.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.ops.decoding.triton.tiles import DEAD, LOG2E, load_vectors, tanh
from attnzoo.ops.launching import interpreted

INTERPRETED = tl.constexpr(interpreted())


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
def weigh(b_halves, b_v, SHIFT: tl.constexpr):
    """Weighted sums of one code of each word."""
    return joined(tl.dot(b_halves, byte_of(b_v, SHIFT), out_dtype=tl.int32))


@triton.jit
def byte_of(words, SHIFT: tl.constexpr):
    """One byte of each word: of four words by three permutations, two of which the next byte shares."""
    if INTERPRETED:
        return (words >> SHIFT).to(tl.int8)
    pair: tl.constexpr = "0x5140" if SHIFT < 16 else "0x7362"  # one byte, then the next, of two words
    take: tl.constexpr = "0x5410" if SHIFT % 16 == 0 else "0x7632"
    pairs: tl.constexpr = "prmt.b32 a, $1, $2, " + pair + "; prmt.b32 b, $3, $4, " + pair + "; "
    asm: tl.constexpr = "{ .reg .b32 a, b; " + pairs + "prmt.b32 $0, a, b, " + take + "; }"
    return tl.inline_asm_elementwise(asm, "=r,r,r,r,r", [words], dtype=tl.int8, is_pure=True, pack=4)


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
