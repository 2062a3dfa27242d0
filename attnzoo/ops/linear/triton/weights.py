"""Weights of a chunk by their age, and what the normaliser needs."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from attnzoo.ops.linear.triton.tiles import load_tile, load_tokens, row_mask

# Rows of the tile in which the normaliser's sums stand: as many as a matrix product needs at least.
NARROW = tl.constexpr(16)
# Terms of a sum that are added one after another.
PIECE = tl.constexpr(32)


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
def load_inverse(inverses, first, low, high, scale, NORMALIZE: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr):
    """1 / t as the forward found it, or the scale; 0 outside the rows [low, high)."""
    if NORMALIZE:
        factor = load_tokens(inverses, first, low, high, CHUNK, FULL)
    elif FULL:
        factor = tl.full([CHUNK], 1.0, tl.float32) * scale
    else:
        factor = tl.where(row_mask(first, low, high, CHUNK), scale, 0.0)
    return factor


@triton.jit
def long_product(a, b, PRECISION: tl.constexpr):
    """a [M, K] times b [K, N]. In fp32 without tensor cores, where a sum that is made term after term loses digits that
    plain PyTorch keeps, it is made of sums of PIECE terms."""
    M: tl.constexpr = a.shape[0]
    K: tl.constexpr = a.shape[1]
    N: tl.constexpr = b.shape[1]
    if a.dtype == tl.float32 and PRECISION != "tf32" and K > PIECE:
        left = tl.permute(tl.reshape(a, [M, K // PIECE, PIECE]), [1, 0, 2])
        right = tl.reshape(b, [K // PIECE, PIECE, N])
        product = tl.sum(tl.dot(left, right, input_precision=PRECISION), 0)
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@triton.jit
def find_dots(
    upstream,
    out,
    o_s,
    dots,
    first,
    low,
    high,
    width,
    write,
    BV: tl.constexpr,
    EVEN: tl.constexpr,
    CHUNK: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """do . out, [CHUNK], from the tile of do; written to `dots` if `write`.

    In fp32 summed as a product sums do . v, so that where an output is nearly one value they differ by as little.
    """
    o = load_tile(out, o_s, first, low, high, width, CHUNK, BV, EVEN, FULL)
    if upstream.dtype == tl.float32 and PRECISION != "tf32":
        products = long_product(upstream, tl.trans(o.to(tl.float32)), PRECISION)
        row = tl.arange(0, CHUNK)
        found = tl.sum(tl.where(row[:, None] == row[None, :], products, 0.0), 1)
    else:
        found = tl.sum(upstream.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(dots + first + tl.arange(0, CHUNK), found, mask=row_mask(first, low, high, CHUNK) & write)
    return found


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
