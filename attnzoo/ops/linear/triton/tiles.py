"""What the linear kernels share: where a program's tokens are, tiles with their feature maps, and decays in a chunk.

A sequence (a row, or a packed document) is cut into parts of `part` tokens, one a program, and a part into chunks.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def locate(lengths, cu_seqlens, table, length, parts, part):
    """Of this program: its sequence, batch row, the sequence's first token, one past its last real token, one past its
    last token, the part's place in the sequence (below 0: nothing to do), and how many parts the sequence has."""
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
    return n, row, begin, end, stop, place, count


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
def load_tile(base, stride, first, low, high, width, ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """[ROWS, BLOCK], 0 outside the rows [low, high) and, unless EVEN, beyond `width` columns."""
    mask = row_mask(first, low, high, ROWS)[:, None]
    if not EVEN:
        mask = mask & (tl.arange(0, BLOCK) < width)[None, :]
    return tl.load(tile_pointers(base, stride, first, ROWS, BLOCK), mask=mask, other=0.0)


@triton.jit
def store_tile(base, stride, first, low, high, width, x, ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Write a tile's rows in [low, high) and its first `width` columns."""
    mask = row_mask(first, low, high, ROWS)[:, None]
    if not EVEN:
        mask = mask & (tl.arange(0, BLOCK) < width)[None, :]
    tl.store(tile_pointers(base, stride, first, ROWS, BLOCK), x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def apply_map(x, MAP: tl.constexpr):
    """elu(x) + 1, relu(x), or x."""
    if MAP == "elu":
        x = tl.where(x > 0, x + 1, tl.exp2(x * 1.4426950408889634))
    if MAP == "relu":
        x = tl.maximum(x, 0)
    return x


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
    MAP: tl.constexpr,
):
    """As `load_tile`, mapped, in fp32.

    The mask is needed for map(0) = 1, and it keeps the compiler from mapping anew in the layout of every product.
    """
    x = load_tile(base, stride, first, low, high, width, ROWS, BLOCK, EVEN).to(tl.float32)
    x = apply_map(x, MAP)
    if MAP != "identity":
        mask = row_mask(first, low, high, ROWS)[:, None]
        if not EVEN:
            mask = mask & (tl.arange(0, BLOCK) < width)[None, :]
        x = tl.where(mask, x, 0.0)
    return x


@triton.jit
def times_slope(d, features, MAP: tl.constexpr):
    """`d` times the map's derivative, which its own value tells."""
    if MAP == "elu":
        d = d * tl.minimum(features, 1.0)
    if MAP == "relu":
        d = tl.where(features > 0, d, 0.0)
    return d


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
    """[CHUNK]: a key's decay until the last real token of its chunk."""
    return tl.exp(log_decay * tl.maximum(real - 1 - tl.arange(0, CHUNK), 0).to(tl.float32))


@triton.jit
def mask_weights(w, log_decay, TRANSPOSED: tl.constexpr, CHUNK: tl.constexpr):
    """Weights of a chunk by their age, decay^(i - j) where j <= i; rows are queries, or keys if TRANSPOSED."""
    age = tl.arange(0, CHUNK)[:, None] - tl.arange(0, CHUNK)[None, :]
    if TRANSPOSED:
        age = -age
    if log_decay is not None:
        w = w * tl.exp(log_decay * tl.maximum(age, 0).to(tl.float32))
    return tl.where(age >= 0, w, 0.0)


@triton.jit
def state_pointers(base, index, v0, d0, D: tl.constexpr, DV: tl.constexpr, RV: tl.constexpr, RD: tl.constexpr):
    """[RV, RD] pointers, transposed, from value v0 and feature d0 on into one state of [..., D, DV], and a mask."""
    values, features = v0 + tl.arange(0, RV), d0 + tl.arange(0, RD)
    pointers = base + tl.cast(index, tl.int64) * (D * DV) + features[None, :] * DV + values[:, None]
    return pointers, (values < DV)[:, None] & (features < D)[None, :]


@triton.jit
def load_state(
    s,
    z,
    index,
    v0,
    d0,
    NORMALIZE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    RV: tl.constexpr,
    RD: tl.constexpr,
):
    """A transposed tile [RV, RD] of one state and, with the normaliser, its z [RD]."""
    pointers, mask = state_pointers(s, index, v0, d0, D, DV, RV, RD)
    features = d0 + tl.arange(0, RD)
    sums = tl.zeros([RD], tl.float32)
    if NORMALIZE:
        sums = tl.load(z + tl.cast(index, tl.int64) * D + features, mask=features < D, other=0.0)
    return tl.load(pointers, mask=mask, other=0.0), sums


@triton.jit
def store_state(
    s,
    z,
    index,
    v0,
    d0,
    state,
    sums,
    NORMALIZE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    RV: tl.constexpr,
    RD: tl.constexpr,
):
    """Write a transposed tile of one state, and z where the tile has the first values."""
    pointers, mask = state_pointers(s, index, v0, d0, D, DV, RV, RD)
    tl.store(pointers, state, mask=mask)
    if NORMALIZE:
        features = d0 + tl.arange(0, RD)
        tl.store(z + tl.cast(index, tl.int64) * D + features, sums, mask=(features < D) & (v0 == 0))


@triton.jit
def part_fade(rate, begin, end, place, part):
    """The decay over the real tokens of a sequence's part."""
    return tl.exp(rate * tl.minimum(tl.maximum(end - begin - place * part, 0), part).to(tl.float32))
