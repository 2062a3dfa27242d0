"""The backward kernel of keys and values for Hopper GPUs, made as `hopper.py` is.

Two groups of four warps own 64 keys each and walk the same tiles of queries, over all heads of a key head's group.
Tiles are transposed, keys by queries, so that probabilities are the left operand, in registers, of the products that
sum up. `query_gradient.py` ran before and left the row statistics.
"""

# mypy: disable-error-code="no-untyped-def"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attnzoo.ops.softmax.triton.hopper_tiles import clear_rows

UNSPECIALISED = ("heads", "group", "q_len", "k_len", "tiles_each", "window", "ahead")


@gluon.jit(do_not_specialize=UNSPECIALISED)
def hopper_keys_kernel(
    q_tiles,  # [B, Hq, Sq, D] in tiles of M rows, and so is d_out
    do_tiles,
    k_tiles,  # [B, Hk, Sk, D] in tiles of 64 rows, and so is v
    v_tiles,
    lse2_tiles,  # [B * Hq, rows] in tiles of M: see `query_gradient.py`; and so is delta
    delta_tiles,
    d_k,
    d_v,
    documents,  # [tiles_each, 8] from `documents.py`, of the keys, or None
    stride_dkb,
    stride_dkh,
    stride_dks,
    stride_dvb,
    stride_dvh,
    stride_dvs,
    heads,
    group,
    q_len,
    k_len,
    tiles_each,  # of keys, for each key head
    window,
    ahead,
    scale,
    factor,  # of products: scale times log2(e), or scale over the softcap
    softcap,  # times log2(e), or None
    D: gl.constexpr,
    DV: gl.constexpr,
    BLOCK: gl.constexpr,  # columns of a tile
    M: gl.constexpr,  # queries in a tile
    STAGES: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
):
    """dK and dV, summed over the query heads of a group."""
    dtype: gl.constexpr = q_tiles.dtype
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    k_here = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, BLOCK], k_tiles.layout)
    v_here = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, BLOCK], v_tiles.layout)
    q_here = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, M, BLOCK], q_tiles.layout)
    do_here = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, M, BLOCK], do_tiles.layout)
    lse2_here = gl.allocate_shared_memory(gl.float32, [STAGES, 1, M], lse2_tiles.layout)
    delta_here = gl.allocate_shared_memory(gl.float32, [STAGES, 1, M], delta_tiles.layout)
    own = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    mbarrier.init(own, count=1)
    for n in gl.static_range(STAGES):
        mbarrier.init(q_full.index(n), count=1)
        mbarrier.init(do_full.index(n), count=1)
        mbarrier.init(empty.index(n), count=2)
    fence_async_shared()

    program = gl.program_id(0)
    tile = program % tiles_each
    head_k = program // tiles_each % (heads // group)
    batch = program // tiles_each // (heads // group)
    first = tile * 128
    k_start = 0
    k_rows = k_len
    q_start = 0
    q_rows = q_len
    row_start = 0
    if documents is not None:
        entry = documents + tile * 8
        first = gl.load(entry)
        k_start = gl.load(entry + 1)
        k_rows = gl.load(entry + 2)
        q_start = gl.load(entry + 3)
        q_rows = gl.load(entry + 4)
        row_start = (q_start // 4 + gl.load(entry + 5)) * 4
    if first < k_rows:
        # Tiles of queries [lo, hi) that see one of the keys, and [full_lo, full_hi) that see all of them.
        lo = 0
        full_lo = 0
        hi = gl.cdiv(q_rows, M)
        full_hi = q_rows // M
        shift = k_rows - q_rows
        if RIGHT:
            lo = gl.maximum(first - shift - ahead, 0) // M
            full_lo = gl.cdiv(gl.maximum(first + 127 - shift - ahead, 0), M)
        if LEFT:
            hi = gl.minimum(hi, gl.cdiv(gl.maximum(first + 127 - shift + window, 0), M))
            full_hi = gl.minimum(full_hi, gl.maximum(first - shift + window, 0) // M)
        lo = gl.minimum(lo, hi)
        full_lo = gl.minimum(gl.maximum(full_lo, lo), hi)
        full_hi = gl.minimum(gl.maximum(full_hi, full_lo), hi)

        places = (k_here, v_here, q_here, do_here, lse2_here, delta_here)
        bars = (own, q_full, do_full, empty)
        sizes = (heads, group, head_k, batch, first, q_start, q_rows, k_start, k_rows, row_start, window, ahead)
        walk = (lo, full_lo, full_hi, hi)
        results = (d_k, d_v, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs)
        gl.warp_specialize(
            [
                (_consume, (gl.constexpr(0), documents, places, bars, sizes, walk, results, scale, factor, softcap, D,
                            DV, BLOCK, M, STAGES, LEFT, RIGHT)),
                (_consume, (gl.constexpr(1), documents, places, bars, sizes, walk, results, scale, factor, softcap, D,
                            DV, BLOCK, M, STAGES, LEFT, RIGHT)),
                (_produce, (q_tiles, do_tiles, k_tiles, v_tiles, lse2_tiles, delta_tiles, places, bars, sizes, walk, M,
                            STAGES)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


@gluon.jit
def _produce(
    q_tiles, do_tiles, k_tiles, v_tiles, lse2_tiles, delta_tiles, places, bars, sizes, walk, M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Copies the keys and values, and then every tile of queries as soon as there is room for it."""
    k_here, v_here, q_here, do_here, lse2_here, delta_here = places
    own, q_full, do_full, empty = bars
    heads, group, head_k, batch, first, q_start, _q_rows, k_start, _k_rows, row_start, _window, _ahead = sizes
    lo, _full_lo, _full_hi, hi = walk
    mbarrier.expect(own, 2 * (k_tiles.block_type.nbytes + v_tiles.block_type.nbytes))
    for c in gl.static_range(2):
        at = [batch, head_k, k_start + first + c * 64, 0]
        tma.async_copy_global_to_shared(k_tiles, at, own, k_here.index(c))
        tma.async_copy_global_to_shared(v_tiles, at, own, v_here.index(c))
    count = 0
    for member in range(group):
        head = head_k * group + member
        for n in range(lo, hi):
            slot = count % STAGES
            at = [batch, head, q_start + n * M, 0]
            row = [batch * heads + head, row_start + n * M]
            mbarrier.wait(empty.index(slot), ((count // STAGES) & 1) ^ 1)
            mbarrier.expect(q_full.index(slot), q_tiles.block_type.nbytes + lse2_tiles.block_type.nbytes)
            tma.async_copy_global_to_shared(q_tiles, at, q_full.index(slot), q_here.index(slot))
            tma.async_copy_global_to_shared(lse2_tiles, row, q_full.index(slot), lse2_here.index(slot))
            mbarrier.expect(do_full.index(slot), do_tiles.block_type.nbytes + delta_tiles.block_type.nbytes)
            tma.async_copy_global_to_shared(do_tiles, at, do_full.index(slot), do_here.index(slot))
            tma.async_copy_global_to_shared(delta_tiles, row, do_full.index(slot), delta_here.index(slot))
            count += 1


@gluon.jit
def _consume(
    C: gl.constexpr, documents, places, bars, sizes, walk, results, scale, factor, softcap, D: gl.constexpr,
    DV: gl.constexpr, BLOCK: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
):  # fmt: skip
    """Group C of 64 keys."""
    d_k, d_v, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs = results
    _heads, group, head_k, batch, first, _q_start, _q_rows, k_start, k_rows, _row_start, _window, _ahead = sizes
    lo, full_lo, full_hi, hi = walk
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    mma_d: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma_d, 2)
    acc_k = gl.zeros([64, BLOCK], gl.float32, mma_d)
    acc_v = gl.zeros([64, BLOCK], gl.float32, mma_d)
    mbarrier.wait(bars[0], 0)
    count = 0
    for _member in range(group):
        for number in range(lo, full_lo):
            acc_k, acc_v = _step(
                number, count, documents, places, bars, sizes, factor, softcap, acc_k, acc_v, C, BLOCK, M, STAGES,
                True, LEFT, RIGHT, mma_s, left,
            )  # fmt: skip
            count += 1
        for number in range(full_lo, full_hi):
            acc_k, acc_v = _step(
                number, count, documents, places, bars, sizes, factor, softcap, acc_k, acc_v, C, BLOCK, M, STAGES,
                False, LEFT, RIGHT, mma_s, left,
            )  # fmt: skip
            count += 1
        for number in range(full_hi, hi):
            acc_k, acc_v = _step(
                number, count, documents, places, bars, sizes, factor, softcap, acc_k, acc_v, C, BLOCK, M, STAGES,
                True, LEFT, RIGHT, mma_s, left,
            )  # fmt: skip
            count += 1
    rows = first + C * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma_d))
    d = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, mma_d))[None, :]
    there = (rows < k_rows)[:, None]
    at = (k_start + rows).to(gl.int64)[:, None]
    dk_base = d_k + batch.to(gl.int64) * stride_dkb + head_k.to(gl.int64) * stride_dkh
    dv_base = d_v + batch.to(gl.int64) * stride_dvb + head_k.to(gl.int64) * stride_dvh
    gl.store(dk_base + at * stride_dks + d, (acc_k * scale).to(d_k.dtype.element_ty), mask=there & (d < D))
    gl.store(dv_base + at * stride_dvs + d, acc_v.to(d_v.dtype.element_ty), mask=there & (d < DV))


@gluon.jit
def _step(
    number, count, documents, places, bars, sizes, factor, softcap, acc_k, acc_v, C: gl.constexpr,
    BLOCK: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr, mma_s: gl.constexpr, left: gl.constexpr,
):  # fmt: skip
    """One more tile of queries. One product waits for nothing while the numbers of another are worked on, and what time
    is left belongs to the other group."""
    k_here, v_here, q_here, do_here, lse2_here, delta_here = places
    _own, q_full, do_full, empty = bars
    q_rows = sizes[6]
    slot = count % STAGES
    full = (count // STAGES) & 1
    by_column: gl.constexpr = gl.SliceLayout(0, mma_s)
    q = q_here.index(slot).reshape((M, BLOCK))
    do = do_here.index(slot).reshape((M, BLOCK))
    zero = gl.zeros([64, M], gl.float32, mma_s)
    mbarrier.wait(q_full.index(slot), full)
    if MASKED and documents is not None:  # noqa: SIM102, as this is known when it compiles
        if number * M + M > q_rows:
            mbarrier.wait(do_full.index(slot), full)
            clear_rows(q, q_rows - number * M, BLOCK, M)
            clear_rows(do, q_rows - number * M, BLOCK, M)
    s = warpgroup_mma(k_here.index(C).reshape((64, BLOCK)), q.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(do_full.index(slot), full)
    dp = warpgroup_mma(v_here.index(C).reshape((64, BLOCK)), do.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    row_lse = lse2_here.index(slot).reshape((M,)).load(by_column)
    x = s * factor
    if softcap is not None:
        t = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)
        x = t * softcap
    if MASKED:
        i = (number * M + gl.arange(0, M, layout=by_column))[None, :]
        j = (sizes[4] + C * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma_s)))[:, None] - (sizes[8] - q_rows)
        seen = i < q_rows
        if RIGHT:
            seen = seen & (j <= i + sizes[11])
        if LEFT:
            seen = seen & (j > i - sizes[10])
    weights = gl.exp2(x - row_lse[None, :])
    if MASKED:  # what is not seen may be NaN here, and once more below
        weights = gl.where(seen, weights, 0.0)
    p = gl.convert_layout(weights.to(q_here.dtype), left)
    if softcap is not None:
        weights *= 1.0 - t * t
    acc_v = warpgroup_mma(p, do, acc_v, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp])
    row_delta = delta_here.index(slot).reshape((M,)).load(by_column)
    weights *= dp - row_delta[None, :]
    if MASKED:
        weights = gl.where(seen, weights, 0.0)
    ds = gl.convert_layout(weights.to(q_here.dtype), left)
    acc_k = warpgroup_mma(ds, q, acc_k, is_async=True)
    acc_k, acc_v, p, ds = warpgroup_mma_wait(0, deps=[acc_k, acc_v, p, ds])
    mbarrier.arrive(empty.index(slot))
    return acc_k, acc_v
