"""Latents for many heads on Hopper GPUs, where products are the limit and Triton's pipeline leaves them waiting.

A program takes 64 queries and one tile of 64 tokens after another. One group of four warps copies tiles, one makes
scores and their softmax, and two multiply the weights with half of a tile's columns each. So the next scores are made
while the last weights are multiplied, and a tile that both are through with is replaced at once.

Gluon, and so without an interpreter: `kernels.py` takes the same calls, and is what this one is tested against.
"""

# mypy: disable-error-code="no-untyped-def"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E = gl.constexpr(1.4426950408889634)
DEAD = gl.constexpr(float("-inf"))
NOWHERE = gl.constexpr(-(2**30))  # position of a query that sees nothing


@gluon.jit(do_not_specialize=["length", "start", "kept", "back", "ahead", "splits"])
def hopper_kernel(
    Q, Q_ROPE,  # [B, HEADS, Q_LEN, RANK] and ROPE
    C, R,  # latents [blocks, 1, size, RANK], rope keys [blocks, 1, size, ROPE]
    TABLE,  # [B, pages]
    LENGTHS, STARTS, KEPT,  # [B], or nothing where all rows are alike
    OUT,  # [B, HEADS, Q_LEN, RANK], dense
    PART,  # [B, HEADS, Q_LEN, splits, RANK], then logsumexps [..., splits], fp32, dense
    length, start, kept,  # what all rows share
    back, ahead,  # query i sees token j iff -ahead <= i - j < back
    scale, splits,
    size, table_width,
    q_batch, q_head, q_token,
    p_batch, p_head, p_token,  # strides of Q_ROPE
    c_block, c_token,
    r_block, r_token,
    HEADS: gl.constexpr, Q_LEN: gl.constexpr, RANK: gl.constexpr, ROPE: gl.constexpr,
    SPLIT: gl.constexpr, PAGE: gl.constexpr, RING: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """One share of one tile of queries: see the top of the file."""
    dtype: gl.constexpr = C.dtype.element_ty
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    i_tile, i_split, i_row = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    row = i_row.to(gl.int64)
    if LENGTHS is not None:
        length += gl.load(LENGTHS + i_row).to(gl.int32)
    if STARTS is not None:
        start += gl.load(STARTS + i_row).to(gl.int32)
    if KEPT is not None:
        kept += gl.load(KEPT + i_row).to(gl.int32)

    # The tokens that at least one query sees, this split's share of them, and those that all queries see.
    first = gl.maximum(start - back + 1, 0)
    if RING:
        first = gl.maximum(first, length - kept)
    last = gl.minimum(length, gl.minimum(start + Q_LEN, length) + ahead)
    low = first // BLOCK_N * BLOCK_N
    high = last
    if SPLIT:
        each = gl.cdiv(gl.cdiv(gl.maximum(last - low, 0), splits), BLOCK_N) * BLOCK_N
        low += i_split * each
        high = gl.minimum(low + each, last)
    tiles = gl.cdiv(gl.maximum(high - low, 0), BLOCK_N)
    clear_low = gl.maximum(first, start + Q_LEN - back)
    clear_high = gl.minimum(high, start + ahead + 1)
    if i_tile * BLOCK_M + BLOCK_M > HEADS * Q_LEN:
        clear_high = clear_low  # some of the tile's queries are none

    Q += row * q_batch
    Q_ROPE += row * p_batch
    if PAGE > 0:
        TABLE += row * table_width
    else:
        C += row * c_block
        R += row * r_block

    q_left = gl.allocate_shared_memory(dtype, [BLOCK_M, RANK // 2], TILE)
    q_right = gl.allocate_shared_memory(dtype, [BLOCK_M, RANK // 2], TILE)
    q_rope = gl.allocate_shared_memory(dtype, [BLOCK_M, ROPE], TILE)
    c_left = gl.allocate_shared_memory(dtype, [2, BLOCK_N, RANK // 2], TILE)
    c_right = gl.allocate_shared_memory(dtype, [2, BLOCK_N, RANK // 2], TILE)
    ropes = gl.allocate_shared_memory(dtype, [2, BLOCK_N, ROPE], TILE)
    weights = gl.allocate_shared_memory(dtype, [BLOCK_M, BLOCK_N], TILE)
    factors = gl.allocate_shared_memory(gl.float32, [BLOCK_M], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())  # weights and factors
    taken = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=128)
        mbarrier.init(empty.index(i), count=3)
    mbarrier.init(ready, count=1)
    mbarrier.init(taken, count=2)

    queries, tokens = (q_left, q_right, q_rope), (c_left, c_right, ropes)
    handed = (weights, factors, ready, taken)
    out_row = row * (HEADS * Q_LEN)
    m0 = i_tile * BLOCK_M
    gl.warp_specialize(
        [
            (_score, (queries, tokens, full, empty, handed, PART, out_row, m0, i_split, splits, start, length, first,
                      low, high, tiles, clear_low, clear_high, back, ahead, scale,
                      HEADS, Q_LEN, RANK, SPLIT, BLOCK_M, BLOCK_N)),
            (_weigh, (gl.constexpr(0), c_left, full, empty, handed, OUT, PART, out_row, m0, i_split, splits, tiles,
                      HEADS, Q_LEN, RANK, SPLIT, BLOCK_M)),
            (_weigh, (gl.constexpr(1), c_right, full, empty, handed, OUT, PART, out_row, m0, i_split, splits, tiles,
                      HEADS, Q_LEN, RANK, SPLIT, BLOCK_M)),
            (_copy, (Q, Q_ROPE, C, R, TABLE, queries, tokens, full, empty, m0, first, low, high, tiles, size,
                     q_head, q_token, p_head, p_token, c_block, c_token, r_block, r_token,
                     HEADS, Q_LEN, RANK, ROPE, PAGE, RING, BLOCK_M, BLOCK_N)),
        ],
        [4, 4, 4],
        [168, 168, 72],
    )  # fmt: skip


@gluon.jit
def _copy(
    Q, Q_ROPE, C, R, TABLE, queries, tokens, full, empty, m0, first, low, high, tiles, size,
    q_head, q_token, p_head, p_token, c_block, c_token, r_block, r_token,
    HEADS: gl.constexpr, Q_LEN: gl.constexpr, RANK: gl.constexpr, ROPE: gl.constexpr, PAGE: gl.constexpr,
    RING: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Copy the queries, which count as part of the first tile, and one tile after another."""
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    q_left, q_right, q_rope = queries
    c_left, c_right, ropes = tokens
    o_r = gl.arange(0, RANK // 2, gl.SliceLayout(0, COPY))[None, :]
    o_p = gl.arange(0, ROPE, gl.SliceLayout(0, COPY))[None, :]
    m = m0 + gl.arange(0, BLOCK_M, gl.SliceLayout(1, COPY))
    real = (m < HEADS * Q_LEN)[:, None]
    q_at = ((m // Q_LEN).to(gl.int64) * q_head + (m % Q_LEN) * q_token)[:, None]
    p_at = ((m // Q_LEN).to(gl.int64) * p_head + (m % Q_LEN) * p_token)[:, None]
    async_copy.async_copy_global_to_shared(q_left, Q + q_at + o_r, mask=real & (o_r >= 0))
    async_copy.async_copy_global_to_shared(q_right, Q + q_at + (RANK // 2 + o_r), mask=real & (o_r >= 0))
    async_copy.async_copy_global_to_shared(q_rope, Q_ROPE + p_at + o_p, mask=real & (o_p >= 0))
    o_n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, COPY))
    for i in range(0, tiles):
        n = low + i * BLOCK_N + o_n
        live = (n >= first) & (n < high)
        if PAGE > 0:
            page, place = gl.load(TABLE + n // PAGE, mask=live, other=0).to(gl.int64), n % PAGE
            c_at, r_at = page * c_block + place * c_token, page * r_block + place * r_token
        else:
            place = (n % size if RING else n).to(gl.int64)
            c_at, r_at = place * c_token, place * r_token
        live = live[:, None]
        c_at, r_at = c_at[:, None], r_at[:, None]
        stage = i % 2
        mbarrier.wait(empty.index(stage), (i // 2 & 1) ^ 1)
        async_copy.async_copy_global_to_shared(ropes.index(stage), R + r_at + o_p, mask=live & (o_p >= 0))
        async_copy.async_copy_global_to_shared(c_left.index(stage), C + c_at + o_r, mask=live & (o_r >= 0))
        c_at += RANK // 2
        async_copy.async_copy_global_to_shared(c_right.index(stage), C + c_at + o_r, mask=live & (o_r >= 0))
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit
def _score(
    queries, tokens, full, empty, handed, PART, out_row, m0, i_split, splits, start, length, first, low, high, tiles,
    clear_low, clear_high, back, ahead, scale,
    HEADS: gl.constexpr, Q_LEN: gl.constexpr, RANK: gl.constexpr, SPLIT: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Make scores, and hand on the weights of each tile and the factors of what came before it."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    q_left, q_right, q_rope = queries
    c_left, c_right, ropes = tokens
    weights, factors, ready, taken = handed
    dtype: gl.constexpr = weights.dtype
    m = m0 + gl.arange(0, BLOCK_M, gl.SliceLayout(1, LAYOUT))
    query = start + m % Q_LEN
    b_query = gl.where((m < HEADS * Q_LEN) & (query < length), query, NOWHERE)  # past the end of its row: sees nothing
    o_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
    b_max = gl.full([BLOCK_M], DEAD, gl.float32, gl.SliceLayout(1, LAYOUT))
    b_sum = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, LAYOUT))
    nothing = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, LAYOUT)
    for i in range(0, tiles):
        n0 = low + i * BLOCK_N
        stage = i % 2
        mbarrier.wait(full.index(stage), i // 2 & 1)
        fence_async_shared()
        b_s = warpgroup_mma(q_rope, ropes.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        b_s = warpgroup_mma(q_left, c_left.index(stage).permute((1, 0)), b_s, is_async=True)
        b_s = warpgroup_mma(q_right, c_right.index(stage).permute((1, 0)), b_s, is_async=True)
        b_s = warpgroup_mma_wait(0, deps=(b_s,)) * (scale * LOG2E)
        mbarrier.arrive(empty.index(stage), count=1)
        if (n0 < clear_low) | (n0 + BLOCK_N > clear_high):
            n = (n0 + o_n)[None, :]
            distance = b_query[:, None] - n
            seen = (n >= first) & (n < high) & (distance < back) & (distance >= -ahead) & (b_query > NOWHERE)[:, None]
            b_s = gl.where(seen, b_s, DEAD)
        b_new = gl.maximum(b_max, gl.max(b_s, 1))
        b_safe = gl.where(b_new == DEAD, 0.0, b_new)
        b_p = gl.exp2(b_s - b_safe[:, None])
        shrink = gl.exp2(b_max - b_safe)
        b_max = b_new
        b_sum = b_sum * shrink + gl.sum(b_p, 1)
        mbarrier.wait(taken, (i & 1) ^ 1)
        weights.store(b_p.to(dtype))
        factors.store(shrink)
        fence_async_shared()
        mbarrier.arrive(ready, count=1)
    seen = (b_sum > 0) & (b_query > NOWHERE)
    mbarrier.wait(taken, (tiles & 1) ^ 1)
    factors.store(gl.where(seen, 1 / gl.where(seen, b_sum, 1.0), 0.0))
    mbarrier.arrive(ready, count=1)
    if SPLIT:
        b_lse = gl.where(seen, b_max / LOG2E + gl.log(gl.where(seen, b_sum, 1.0)), DEAD)
        LSE = PART + gl.num_programs(2).to(gl.int64) * (HEADS * Q_LEN) * splits * RANK
        gl.store(LSE + (out_row + m) * splits + i_split, b_lse, mask=m < HEADS * Q_LEN)


@gluon.jit
def _weigh(
    SIDE: gl.constexpr, half, full, empty, handed, OUT, PART, out_row, m0, i_split, splits, tiles,
    HEADS: gl.constexpr, Q_LEN: gl.constexpr, RANK: gl.constexpr, SPLIT: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """Add up half of the columns of the weighted sums."""
    HALF: gl.constexpr = RANK // 2
    # Products of 256 columns would take more registers than a thread has before they are dealt out.
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    weights, factors, ready, taken = handed
    b_acc = gl.zeros([BLOCK_M, HALF], gl.float32, LAYOUT)
    for i in range(0, tiles):
        stage = i % 2
        mbarrier.wait(full.index(stage), i // 2 & 1)
        mbarrier.wait(ready, i & 1)
        b_acc = b_acc * factors.load(ROWS)[:, None]
        fence_async_shared()
        b_acc = warpgroup_mma(weights, half.index(stage), b_acc, is_async=True)
        b_acc = warpgroup_mma_wait(0, deps=(b_acc,))
        mbarrier.arrive(taken, count=1)
        mbarrier.arrive(empty.index(stage), count=1)
    mbarrier.wait(ready, tiles & 1)
    b_acc = b_acc * factors.load(ROWS)[:, None]
    o_r = SIDE * HALF + gl.arange(0, HALF, gl.SliceLayout(0, LAYOUT))
    m = m0 + gl.arange(0, BLOCK_M, ROWS)
    real = m < HEADS * Q_LEN
    if SPLIT:
        at = ((out_row + m) * splits + i_split) * RANK
        gl.store(PART + at[:, None] + o_r[None, :], b_acc, mask=real[:, None])
    else:
        at = (out_row + m) * RANK
        gl.store(OUT + at[:, None] + o_r[None, :], b_acc.to(OUT.dtype.element_ty), mask=real[:, None])
