"""What forward and backward kernels share: which sequence a program works on, which tiles it walks, what a score is.

Names: i, j are positions in a sequence, bottom-right aligned; t, u are rows of its queries and of its keys, so that
i = t + shift and j = u. Scores are kept times log2(e), so that exponentials are powers of two.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from triton import knobs

from attnzoo.ops.softmax.triton.sees import sees

# Numbers that change from call to call and whose divisibility helps nobody: kernels are not compiled again for them.
UNSPECIALISED = ("heads", "q_len", "k_len", "tiles_each", "documents", "window", "ahead", "stride_slopes")

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.0e38)  # a row's greatest score before it saw any; finite, so that no inf - inf arises


@triton.constexpr_function
def copied(walk, ends):
    """Whether a walk reads tiles through descriptors: whole ones are walked first, then the partial ones that `ends`
    admits, then the others."""
    return walk == 0 or (walk == 1 and ends > 0)


@triton.constexpr_function
def stages(walk, ends, partial):
    """Stages of a walk's pipeline; None: those of the kernel."""
    if walk == 0:
        return None
    return partial if copied(walk, ends) else 1


@triton.constexpr_function
def compiled():
    """Whether these are real kernels, and not interpreted ones."""
    return not knobs.runtime.interpret


@triton.jit
def uniform(x):
    """A number that all threads have, so that the compiler knows it too.

    What was read from memory or summed over threads may differ from thread to thread for all that it knows, and loops
    up to such a number keep every address in registers of each thread: a quarter more instructions.
    """
    if compiled():
        x = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )
    return x


@triton.jit
def document_of(tile, cu, documents, BLOCK: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Which document the grid's `tile` belongs to, when documents are cut into tiles one after another, and its first
    tile. Past the last tile the number is `documents`."""
    n = tl.arange(0, DOCUMENTS)
    start = tl.load(cu + n, mask=n < documents, other=0).to(tl.int32)
    end = tl.load(cu + n + 1, mask=n < documents, other=0).to(tl.int32)
    tiles = (end - start + BLOCK - 1) // BLOCK
    ends = tl.cumsum(tiles, 0)
    document = tl.sum(((ends <= tile) & (n < documents)).to(tl.int32), 0)
    first = tl.sum(tl.where(n == document, ends - tiles, 0), 0)
    return uniform(document), uniform(first)


@triton.jit
def sequence(
    number,
    batch,
    q_len,
    k_len,
    key_lengths,
    cu_q,
    cu_k,
    PACKED: tl.constexpr,
    STEP: tl.constexpr,
):
    """The sequence that a program works on: first row and number of rows of its queries and of its keys, the keys that
    are not padding, and the shift between query rows and positions.

    It is a document if PACKED, and a residue class of positions if STEP > 1: rows are then STEP apart in memory.
    """
    if PACKED:
        q_start = uniform(tl.load(cu_q + number).to(tl.int32))
        k_start = uniform(tl.load(cu_k + number).to(tl.int32))
        q_rows = uniform(tl.load(cu_q + number + 1).to(tl.int32)) - q_start
        k_rows = uniform(tl.load(cu_k + number + 1).to(tl.int32)) - k_start
        shift = k_rows - q_rows
        k_seen = k_rows
    else:
        seen = k_len
        if key_lengths is not None:
            seen = uniform(tl.minimum(tl.load(key_lengths + batch).to(tl.int32), k_len))
        if STEP == 1:
            q_start = 0
            k_start = 0
            q_rows = q_len
            k_rows = k_len
            k_seen = seen
            shift = k_len - q_len
        else:
            # Query row r stands at position r + k_len - q_len; this class has the positions that leave `number`.
            k_start = number
            q_start = ((number + q_len - k_len) % STEP + STEP) % STEP
            q_rows = tl.maximum((q_len - q_start + STEP - 1) // STEP, 0)
            k_rows = tl.maximum((k_len - k_start + STEP - 1) // STEP, 0)
            k_seen = tl.maximum((seen - k_start + STEP - 1) // STEP, 0)
            distance = q_start + k_len - q_len - k_start  # a multiple of STEP, perhaps negative
            shift = tl.where(distance >= 0, distance // STEP, -((-distance) // STEP))
    return q_start, q_rows, k_start, k_rows, k_seen, shift


@triton.jit
def statistics_start(number, q_start, PACKED: tl.constexpr):
    """Where the row statistics of a sequence start: those of a document behind those of the document before, at a
    multiple of 16 bytes, since the copy engine starts nowhere else."""
    start = q_start
    if PACKED:
        start = (q_start // 4 + number) * 4
    return start


@triton.jit
def key_range(
    first, rows, shift, k_seen, window, ahead, BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr
):
    """Keys that query rows `first ... first + rows - 1` see under -ahead <= i - j < window: the tiles [lo, hi) hold
    them all, and in the tiles [full_lo, full_hi) every row sees every key. All but hi are multiples of BLOCK_N."""
    lo = 0
    full_lo = 0
    hi = k_seen
    full_hi = (k_seen // BLOCK_N) * BLOCK_N
    if LEFT:
        lo = (tl.maximum(first + shift - window + 1, 0) // BLOCK_N) * BLOCK_N
        full_lo = tl.cdiv(tl.maximum(first + rows + shift - window, 0), BLOCK_N) * BLOCK_N
    if RIGHT:
        hi = tl.maximum(tl.minimum(hi, first + rows + shift + ahead), 0)
        full_hi = tl.minimum(full_hi, (tl.maximum(first + shift + ahead + 1, 0) // BLOCK_N) * BLOCK_N)
    full_lo = tl.minimum(full_lo, tl.cdiv(hi, BLOCK_N) * BLOCK_N)
    full_hi = tl.maximum(full_hi, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def query_range(
    first, rows, shift, q_rows, k_seen, window, ahead, BLOCK_M: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr
):
    """As `key_range`, the other way round: query rows that see keys `first ... first + rows - 1`."""
    lo = 0
    full_lo = 0
    hi = q_rows
    full_hi = (q_rows // BLOCK_M) * BLOCK_M
    if RIGHT:  # t + shift + ahead >= j
        lo = (tl.maximum(first - shift - ahead, 0) // BLOCK_M) * BLOCK_M
        full_lo = tl.cdiv(tl.maximum(first + rows - 1 - shift - ahead, 0), BLOCK_M) * BLOCK_M
    if LEFT:  # t + shift - window < j
        hi = tl.maximum(tl.minimum(hi, first + rows - 1 - shift + window), 0)
        full_hi = tl.minimum(full_hi, (tl.maximum(first - shift + window, 0) // BLOCK_M) * BLOCK_M)
    if first + rows > k_seen:  # padding in the tile: no row sees all of it
        full_hi = 0
    if first >= k_seen:
        hi = 0
    full_lo = tl.minimum(full_lo, tl.cdiv(hi, BLOCK_M) * BLOCK_M)
    full_hi = tl.maximum(full_hi, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def nth_partial(n, lo, full_lo, full_hi, BLOCK: tl.constexpr):
    """Start of the n-th tile of [lo, full_lo) and [full_hi, hi) together."""
    left = (full_lo - lo) // BLOCK
    return tl.where(n < left, lo + n * BLOCK, full_hi + (n - left) * BLOCK)


@triton.jit
def count_partial(lo, full_lo, full_hi, hi, BLOCK: tl.constexpr):
    """How many tiles `nth_partial` counts."""
    return tl.maximum(full_lo - lo, 0) // BLOCK + tl.cdiv(tl.maximum(hi - full_hi, 0), BLOCK)


@triton.jit
def part_of_partial(count, lo, full_lo, full_hi, rows, BLOCK: tl.constexpr, INSIDE: tl.constexpr):
    """Which of `count` partial tiles hang over the end of the rows, at most the last, or which do not."""
    over = nth_partial(count - 1, lo, full_lo, full_hi, BLOCK) + BLOCK > rows
    inside = tl.maximum(count - over.to(tl.int32), 0)
    if INSIDE:
        begin = count * 0
        end = inside
    else:
        begin = inside
        end = count
    return begin, end


@triton.jit
def load_rows(
    base, row, stride, there, COUNT: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr
):
    """COUNT rows from `row` on and columns [START, START + BLOCK) of a matrix; zeros past DIM and where not `there`.

    `stride` is that of neighbours in the sequence; `there` is a mask of the rows, or None: all of them.
    """
    n = tl.arange(0, COUNT)
    d = START + tl.arange(0, BLOCK)
    # The tile's start may lie past 2^31 elements; what is inside a tile does not.
    pointers = base + tl.cast(row, tl.int64) * stride + n[:, None] * stride + d[None, :]
    if START + BLOCK > DIM:
        if there is None:
            tile = tl.load(pointers, mask=(d < DIM)[None, :], other=0.0)
        else:
            tile = tl.load(pointers, mask=there[:, None] & (d < DIM)[None, :], other=0.0)
    else:
        if there is None:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=there[:, None], other=0.0)
    return tile


@triton.jit
def load_tile(tiles, batch, head, row, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """COUNT rows from `row` on, all of which exist, through a tensor descriptor: Hopper copies them by itself (TMA),
    which costs no registers for addresses."""
    return tiles.load([batch, head, row, 0]).reshape([COUNT, BLOCK])


@triton.jit
def accumulate(acc, a, b, scale, PRECISION: tl.constexpr):
    """acc + a @ b. In full fp32 each tile is summed by itself: one chain of thousands of additions rounds more than
    plain PyTorch does."""
    if a.dtype == tl.float32 and PRECISION == "ieee":
        nothing = tl.zeros_like(acc) + scale * 0.0  # a zero that the compiler does not know, or it would join the sums
        acc += tl.dot(a, b, nothing, input_precision=PRECISION)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def tanh(x, FAST: tl.constexpr):
    """tanh, by one instruction where its relative error of 2^-11 is less than the inputs' own."""
    if FAST:
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        size = tl.abs(x)
        e = tl.exp(-2.0 * size)
        large = (1.0 - e) / (1.0 + e)
        s = x * x  # where 1 - e cancels, the series
        small = size * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
        y = tl.where(size < 0.25, small, large)
        y = tl.where(x < 0, -y, y)
    return y


@triton.jit
def score(
    s,  # [M, N] or [N, M]: products of queries and keys
    scale,
    softcap,
    slope,
    i,  # [M, 1] or [1, M]
    j,  # [1, N] or [N, 1]
    bias,  # pointer to the bias of this batch entry and head, or None
    stride_bias_q,
    stride_bias_k,
    row,  # index of each query, and of each key, in memory: shapes as i and j
    column,
    inside,  # whether both exist; only read with a bias
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    STEP: tl.constexpr,
    FAST: tl.constexpr,
):
    """Scores times log2(e), and tanh of the scaled products if there is a softcap (else nothing of use)."""
    if SOFTCAP:
        t = tanh(s * (scale / softcap), FAST)
        s = t * (softcap * LOG2E)
    else:
        t = s
        s = s * (scale * LOG2E)
    if bias is not None:
        at = bias + row.to(tl.int64) * stride_bias_q + column.to(tl.int64) * stride_bias_k
        added = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        s = tl.where(added == float("-inf"), added, s + added * LOG2E)  # -inf hides NaN as well
    if ALIBI:
        # In floats from the start: a conversion of each distance costs as much as its exponential.
        s -= (slope * (STEP * LOG2E)) * tl.abs(i.to(tl.float32) - j.to(tl.float32))
    return s, t


@triton.jit
def masked(
    s,
    hidden,  # what hidden elements become
    i,
    j,
    inside,  # a condition that holds as well, or None; needed with `dense`
    window,
    ahead,
    PROGRAM: tl.constexpr,
    tables,
    head,
    dense,  # pointer to the bool mask of this batch entry and head, or None
    stride_dense_q,
    stride_dense_k,
    row,
    column,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """A tile with the elements replaced whose query does not see its key."""
    if RIGHT:
        s = tl.where(j <= i + ahead, s, hidden)
    if LEFT:
        s = tl.where(i - j < window, s, hidden)
    if inside is not None:
        s = tl.where(inside, s, hidden)
    if PROGRAM is not None:
        s = tl.where(sees(PROGRAM, tables, head, i, j), s, hidden)
    if dense is not None:
        at = dense + row.to(tl.int64) * stride_dense_q + column.to(tl.int64) * stride_dense_k
        s = tl.where(tl.load(at, mask=inside, other=0) != 0, s, hidden)
    return s


@triton.jit
def kept(seed, head, row, column, dropout_p):
    """Whether a weight survives dropout: Philox of the element's place, so that the backward draws the same."""
    shape = row + column
    low = tl.load(seed)
    bits, _, _, _ = tl.philox(low, row + shape * 0, column + shape * 0, head + shape * 0, shape * 0, n_rounds=7)
    return (bits >> 8).to(tl.float32) * (1.0 / 16777216.0) >= dropout_p
