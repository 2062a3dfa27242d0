"""Tiles of the linear kernels: where a program's tokens are, loads with their feature maps, weights by their age.

A sequence (a row, or a packed document) is cut into parts of `part` tokens, one a program, and a part into chunks.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

# Rows of the tile in which the normaliser's sums stand: as many as a matrix product needs at least.
NARROW = tl.constexpr(16)


class Where(NamedTuple):
    """Where a program's tokens are: a part of a sequence."""

    n: tl.tensor  # the sequence
    row: tl.tensor  # of the batch
    begin: tl.tensor  # the sequence's first token
    end: tl.tensor  # one past its last real token
    stop: tl.tensor  # one past its last token
    place: tl.tensor  # of the part in the sequence; below 0 there is nothing to do
    count: tl.tensor  # parts of the sequence
    start: tl.tensor  # the part's first token


@triton.jit
def locate(lengths, cu_seqlens, table, length, parts, part):
    """Where this program's tokens are."""
    p = tl.program_id(0)
    if cu_seqlens is not None:
        n = tl.load(table + 2 * p).to(tl.int32)
        place = tl.load(table + 2 * p + 1).to(tl.int32)
        row = n * 0
        begin = tl.load(cu_seqlens + n).to(tl.int32)
        end = tl.load(cu_seqlens + n + 1).to(tl.int32)
        stop = end
        count = tl.maximum((end - begin + part - 1) // part, 1)
    else:
        n = p // parts
        place = p % parts
        row = n
        begin = n * 0
        stop = begin + length
        end = stop
        if lengths is not None:
            end = tl.load(lengths + n).to(tl.int32)
        count = begin + parts
    return Where(n, row, begin, end, stop, place, count, begin + place * part)


@triton.jit
def load_rate(log_decay, head):
    """The natural log of a head's decay, None where nothing decays."""
    rate = None
    if log_decay is not None:
        rate = tl.load(log_decay + head).to(tl.float32)
    return rate


@triton.jit
def head_base(x, row, head, stride_b, stride_h):
    """The first token of one head."""
    return x + row.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def row_mask(first, low, high, ROWS: tl.constexpr):
    """Which of the rows from `first` on are in [low, high)."""
    rows = first + tl.arange(0, ROWS)
    return (rows >= low) & (rows < high)


@triton.jit
def tile_pointers(base, stride, first, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """[ROWS, BLOCK] pointers from row `first` on, whose offset may be past 2^31."""
    start = base + tl.cast(first, tl.int64) * stride
    return start + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, BLOCK)[None, :]


@triton.jit
def tile_mask(first, low, high, width, ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr):
    """[ROWS, BLOCK], or one that broadcasts to it: rows in [low, high) unless FULL, columns in `width` unless EVEN."""
    columns = (tl.arange(0, BLOCK) < width)[None, :]
    if FULL:
        mask = columns
    elif EVEN:
        mask = row_mask(first, low, high, ROWS)[:, None]
    else:
        mask = row_mask(first, low, high, ROWS)[:, None] & columns
    return mask


@triton.jit
def load_tile(
    base,
    stride,
    first,
    low,
    high,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    FULL: tl.constexpr,
):
    """[ROWS, BLOCK], 0 outside the rows [low, high) unless FULL, and beyond `width` columns unless EVEN."""
    pointers = tile_pointers(base, stride, first, ROWS, BLOCK)
    if FULL and EVEN:  # without masks there are fewer registers to spill: worth up to a quarter of the time
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=tile_mask(first, low, high, width, ROWS, BLOCK, EVEN, FULL), other=0.0)
    return x


@triton.jit
def store_tile(
    base,
    stride,
    first,
    low,
    high,
    width,
    x,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    FULL: tl.constexpr,
):
    """Write a tile's rows in [low, high), all if FULL, and its first `width` columns, all if EVEN."""
    pointers = tile_pointers(base, stride, first, ROWS, BLOCK)
    x = x.to(base.dtype.element_ty)
    if FULL and EVEN:
        tl.store(pointers, x)
    else:
        tl.store(pointers, x, mask=tile_mask(first, low, high, width, ROWS, BLOCK, EVEN, FULL))


@triton.jit
def apply_map(x, MAP: tl.constexpr):
    """elu(x) + 1, relu(x), or x, in x's own dtype."""
    if MAP == "elu":
        if x.dtype == tl.bfloat16:
            x = elu_of_pairs(x)
        else:
            x = tl.where(x > 0, x + 1, tl.exp2(x * 1.4426950408889634))
    if MAP == "relu":
        x = tl.maximum(x, 0.0).to(x.dtype)
    return x


@triton.jit
def elu_of_pairs(x):
    """elu(x) + 1 of bf16: the lesser of e^x and max(x, 0) + 1, two numbers an instruction but for the exponentials.

    Said to be impure, or else the compiler maps anew for every layout in which a product wants the features. Where the
    GPU here is a Blackwell it is pure, as the pipeliner for those takes nothing else.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low, high, linear, one, zero;
        .reg .f32 a, b;
        shl.b32 low, $1, 16;
        and.b32 high, $1, 0xffff0000;
        mul.f32 a, low, 0f3FB8AA3B;
        mul.f32 b, high, 0f3FB8AA3B;
        ex2.approx.ftz.f32 a, a;
        ex2.approx.ftz.f32 b, b;
        mov.b32 one, 0x3f803f80;
        mov.b32 zero, 0x80008000;
        fma.rn.relu.bf16x2 linear, $1, one, zero;
        fma.rn.bf16x2 linear, linear, one, one;
        cvt.rn.bf16x2.f32 $0, b, a;
        min.NaN.bf16x2 $0, $0, linear;
        }""",
        "=r,r",
        [x],
        dtype=tl.bfloat16,
        is_pure=cuda_capability_geq(10, 0),
        pack=2,
    )


@triton.jit
def load_features(
    base,
    stride,
    first,
    low,
    high,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    FULL: tl.constexpr,
    MAP: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """As `load_tile`, mapped, in COMPUTE; map(0) outside the rows, and 0 beyond `width`."""
    x = load_tile(base, stride, first, low, high, width, ROWS, BLOCK, EVEN, FULL).to(COMPUTE)
    x = apply_map(x, MAP)
    if MAP == "elu" and not EVEN:
        x = tl.where((tl.arange(0, BLOCK) < width)[None, :], x, 0.0).to(COMPUTE)
    return x


@triton.jit
def load_late_features(
    base,
    stride,
    first,
    low,
    high,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    FULL: tl.constexpr,
    MAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    LATE: tl.constexpr,
):
    """As `load_features`; if LATE 0 outside the rows [low, high): before a sequence's first far key there are none."""
    x = load_features(base, stride, first, low, high, width, ROWS, BLOCK, EVEN, FULL, MAP, COMPUTE)
    if LATE:
        x = tl.where(row_mask(first, low, high, ROWS)[:, None], x, 0.0).to(COMPUTE)
    return x


@triton.jit
def load_tokens(x, first, low, high, CHUNK: tl.constexpr, FULL: tl.constexpr):
    """One number a token, [CHUNK], 0 outside the rows [low, high)."""
    if FULL:
        found = tl.load(x + first + tl.arange(0, CHUNK))
    else:
        found = tl.load(x + first + tl.arange(0, CHUNK), mask=row_mask(first, low, high, CHUNK), other=0.0)
    return found


@triton.jit
def store_tokens(x, first, low, high, values, CHUNK: tl.constexpr, FULL: tl.constexpr):
    """Write one number a token, to the rows in [low, high)."""
    if FULL:
        tl.store(x + first + tl.arange(0, CHUNK), values)
    else:
        tl.store(x + first + tl.arange(0, CHUNK), values, mask=row_mask(first, low, high, CHUNK))


@triton.jit
def times_slope(d, features, MAP: tl.constexpr):
    """`d` times the map's derivative, which its own value tells."""
    if MAP == "elu":
        d = d * tl.minimum(features.to(tl.float32), 1.0)
    if MAP == "relu":
        d = tl.where(features > 0, d, 0.0)
    return d


@triton.jit
def twice(x):
    """[NARROW, N]: the vector x [N] in the first two rows, zeros below. So z is kept (see `pieces`)."""
    return tl.where((tl.arange(0, NARROW) < 2)[:, None], x[None, :], 0.0)


@triton.jit
def pieces(z, COMPUTE: tl.constexpr):
    """A tile of `twice` in COMPUTE, its rows now what of z there is room for in one number, and the rest."""
    row = tl.arange(0, NARROW)[:, None]
    high = z.to(COMPUTE).to(tl.float32)
    return tl.where(row == 0, high, tl.where(row == 1, z - high, 0.0)).to(COMPUTE)


@triton.jit
def narrow_rows(x, COMPUTE: tl.constexpr):
    """[NARROW, N] in COMPUTE, whose rows sum to the vector x [N] nearly as accurately as in fp32."""
    return pieces(twice(x), COMPUTE)


@triton.jit
def inverse_or_zero(total):
    """1 / total, and 0 where the total is 0."""
    return tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))


@triton.jit
def real_tokens(first, end, CHUNK: tl.constexpr):
    """How many of a chunk's tokens are real."""
    return tl.minimum(tl.maximum(end - first, 0), CHUNK)


@triton.jit
def decay_since(log_decay, CHUNK: tl.constexpr):
    """[CHUNK]: decay^(i + 1), the age of the state that a query reads."""
    return tl.exp(log_decay * (tl.arange(0, CHUNK) + 1).to(tl.float32))


@triton.jit
def decay_until(log_decay, real, CHUNK: tl.constexpr):
    """[CHUNK]: a key's decay until the last real token of its chunk; 0 for those that are not real."""
    left = real - 1 - tl.arange(0, CHUNK)
    return tl.where(left >= 0, tl.exp(log_decay * tl.maximum(left, 0).to(tl.float32)), 0.0)


@triton.jit
def mask_weights(w, log_decay, TRANSPOSED: tl.constexpr, CHUNK: tl.constexpr):
    """Weights of a chunk by their age, decay^(i - j) where j <= i; rows are queries, or keys if TRANSPOSED."""
    age = tl.arange(0, CHUNK)[:, None] - tl.arange(0, CHUNK)[None, :]
    if TRANSPOSED:
        age = -age
    if log_decay is not None:
        w = w * tl.exp(log_decay * tl.maximum(age, 0).to(tl.float32))
    return tl.where(age >= 0, w, 0.0)
