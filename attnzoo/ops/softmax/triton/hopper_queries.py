"""The backward kernel of queries for Hopper GPUs, made as `hopper.py` is; it runs before `hopper_keys.py`.

Two groups of four warps own 64 queries each and walk the same tiles of keys and values.
"""

# mypy: disable-error-code="no-untyped-def,attr-defined"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attnzoo.ops.softmax.triton.hopper import LOG2E
from attnzoo.ops.softmax.triton.hopper_keys import UNSPECIALISED
from attnzoo.ops.softmax.triton.hopper_tiles import clear_rows


@gluon.jit(do_not_specialize=UNSPECIALISED)
def hopper_queries_kernel(
    q_tiles,  # [B, Hq, Sq, D] in tiles of 64 rows, and so is d_out
    do_tiles,
    k_tiles,  # [B, Hk, Sk, D] in tiles of N rows, and so is v
    v_tiles,
    out,
    d_out,
    lse,  # [B, Hq, Sq]
    d_lse,  # [B, Hq, Sq] or None
    lse2,  # [B, Hq, stride_rows], written here, and so is delta: see `query_gradient.py`
    delta,
    d_q,
    documents,  # [tiles_each, 8] from `documents.py`, or None
    stride_ob,
    stride_oh,
    stride_os,
    stride_dob,
    stride_doh,
    stride_dos,
    stride_dqb,
    stride_dqh,
    stride_dqs,
    stride_rows,
    heads,
    group,
    q_len,
    k_len,
    tiles_each,  # of queries, for each head
    window,
    ahead,
    scale,
    factor,  # of products: scale times log2(e), or scale over the softcap
    softcap,  # times log2(e), or None
    D: gl.constexpr,
    DV: gl.constexpr,
    BLOCK: gl.constexpr,  # columns of a tile
    N: gl.constexpr,  # keys in a tile
    STAGES: gl.constexpr,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
):
    """dQ and the row statistics."""
    dtype: gl.constexpr = q_tiles.dtype
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_here = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, BLOCK], q_tiles.layout)
    do_here = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, BLOCK], do_tiles.layout)
    k_here = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, N, BLOCK], k_tiles.layout)
    v_here = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, N, BLOCK], v_tiles.layout)
    own = gl.allocate_shared_memory(gl.int64, [1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    mbarrier.init(own, count=1)
    for n in gl.static_range(STAGES):
        mbarrier.init(k_full.index(n), count=1)
        mbarrier.init(v_full.index(n), count=1)
        mbarrier.init(empty.index(n), count=2)
    fence_async_shared()

    program = gl.program_id(0)
    tile = tiles_each - 1 - program % tiles_each  # late queries of a causal mask see the most keys
    head = program // tiles_each % heads
    batch = program // tiles_each // heads
    first = tile * 128
    q_start = 0
    q_rows = q_len
    k_start = 0
    k_rows = k_len
    row_start = 0
    if documents is not None:
        entry = documents + tile * 8
        first = gl.load(entry)
        q_start = gl.load(entry + 1)
        q_rows = gl.load(entry + 2)
        k_start = gl.load(entry + 3)
        k_rows = gl.load(entry + 4)
        row_start = (q_start // 4 + gl.load(entry + 5)) * 4
    if first < q_rows:
        # Tiles of keys [lo, hi) that one of the queries sees, and [full_lo, full_hi) that all of them see.
        position = first + k_rows - q_rows
        lo = 0
        full_lo = 0
        hi = gl.cdiv(k_rows, N)
        full_hi = k_rows // N
        if LEFT:
            lo = gl.maximum(position - window + 1, 0) // N
            full_lo = gl.cdiv(gl.maximum(position + 128 - window, 0), N)
        if RIGHT:
            hi = gl.minimum(hi, gl.cdiv(gl.maximum(position + 128 + ahead, 0), N))
            full_hi = gl.minimum(full_hi, gl.maximum(position + ahead + 1, 0) // N)
        lo = gl.minimum(lo, hi)
        full_lo = gl.minimum(gl.maximum(full_lo, lo), hi)
        full_hi = gl.minimum(gl.maximum(full_hi, full_lo), hi)

        places = (q_here, do_here, k_here, v_here)
        bars = (own, k_full, v_full, empty)
        sizes = (head, batch, first, q_start, q_rows, k_start, k_rows, window, ahead)
        walk = (lo, full_lo, full_hi, hi)
        o_base = out + batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh + q_start.to(gl.int64) * stride_os
        do_base = d_out + batch.to(gl.int64) * stride_dob + head.to(gl.int64) * stride_doh
        do_base += q_start.to(gl.int64) * stride_dos
        dq_base = d_q + batch.to(gl.int64) * stride_dqb + head.to(gl.int64) * stride_dqh
        dq_base += q_start.to(gl.int64) * stride_dqs
        row = (batch * heads + head).to(gl.int64)
        own_rows = row * q_len + q_start
        lse2_base = lse2 + row * stride_rows + row_start
        delta_base = delta + row * stride_rows + row_start
        wide = (o_base, stride_os, do_base, stride_dos, dq_base, stride_dqs)
        rows = (lse, own_rows, lse2_base, delta_base, stride_rows)
        gl.warp_specialize(
            [
                (_consume, (gl.constexpr(0), documents, d_lse, places, bars, sizes, walk, wide, rows, scale, factor,
                            softcap, D, DV, BLOCK, N, STAGES, LEFT, RIGHT)),
                (_consume, (gl.constexpr(1), documents, d_lse, places, bars, sizes, walk, wide, rows, scale, factor,
                            softcap, D, DV, BLOCK, N, STAGES, LEFT, RIGHT)),
                (_produce, (q_tiles, do_tiles, k_tiles, v_tiles, places, bars, sizes, walk, group, N, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


@gluon.jit
def _produce(
    q_tiles, do_tiles, k_tiles, v_tiles, places, bars, sizes, walk, group, N: gl.constexpr, STAGES: gl.constexpr
):
    """Copies the queries and their outputs' gradients, and then every tile of keys and values."""
    q_here, do_here, k_here, v_here = places
    own, k_full, v_full, empty = bars
    head, batch, first, q_start, _q_rows, k_start, _k_rows, _window, _ahead = sizes
    lo, _full_lo, _full_hi, hi = walk
    mbarrier.expect(own, 2 * (q_tiles.block_type.nbytes + do_tiles.block_type.nbytes))
    for c in gl.static_range(2):
        at = [batch, head, q_start + first + c * 64, 0]
        tma.async_copy_global_to_shared(q_tiles, at, own, q_here.index(c))
        tma.async_copy_global_to_shared(do_tiles, at, own, do_here.index(c))
    for count in range(hi - lo):
        slot = count % STAGES
        at = [batch, head // group, k_start + (lo + count) * N, 0]
        mbarrier.wait(empty.index(slot), ((count // STAGES) & 1) ^ 1)
        mbarrier.expect(k_full.index(slot), k_tiles.block_type.nbytes)
        tma.async_copy_global_to_shared(k_tiles, at, k_full.index(slot), k_here.index(slot))
        mbarrier.expect(v_full.index(slot), v_tiles.block_type.nbytes)
        tma.async_copy_global_to_shared(v_tiles, at, v_full.index(slot), v_here.index(slot))


@gluon.jit
def _consume(
    C: gl.constexpr, documents, d_lse, places, bars, sizes, walk, wide, rows, scale, factor, softcap, D: gl.constexpr,
    DV: gl.constexpr, BLOCK: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
):  # fmt: skip
    """Group C of 64 queries."""
    o_base, stride_os, do_base, stride_dos, dq_base, stride_dqs = wide
    lse, own_rows, lse2, delta, stride_rows = rows
    first = sizes[2]
    q_rows = sizes[4]
    lo, full_lo, full_hi, hi = walk
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    mma_d: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, mma_s)
    spread: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK, BLOCK // 8], [4, 1], [1, 0])
    t = first + C * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, spread))
    d = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, spread))[None, :]
    there = (t < q_rows)[:, None] & (d < DV)
    o = gl.load(o_base + t.to(gl.int64)[:, None] * stride_os + d, mask=there, other=0.0)
    do = gl.load(do_base + t.to(gl.int64)[:, None] * stride_dos + d, mask=there, other=0.0)
    row_delta = gl.convert_layout(gl.sum(o.to(gl.float32) * do.to(gl.float32), 1), by_row)
    row = first + C * 64 + gl.arange(0, 64, layout=by_row)
    exists = row < q_rows
    row_lse = gl.load(lse + own_rows + row, mask=exists, other=float("inf")) * LOG2E
    if d_lse is not None:
        row_delta -= gl.load(d_lse + own_rows + row, mask=exists, other=0.0)
    written = exists
    if documents is None:  # the other kernel reads the padding of the last tile too
        written = row < stride_rows
    gl.store(lse2 + row, row_lse, mask=written)
    gl.store(delta + row, row_delta, mask=written)

    acc = gl.zeros([64, BLOCK], gl.float32, mma_d)
    mbarrier.wait(bars[0], 0)
    count = 0
    for number in range(lo, full_lo):
        acc = _step(
            number, count, documents, places, bars, sizes, factor, softcap, acc, row, row_lse, row_delta, C, BLOCK, N,
            STAGES, True, LEFT, RIGHT, mma_s, mma_d,
        )  # fmt: skip
        count += 1
    for number in range(full_lo, full_hi):
        acc = _step(
            number, count, documents, places, bars, sizes, factor, softcap, acc, row, row_lse, row_delta, C, BLOCK, N,
            STAGES, False, LEFT, RIGHT, mma_s, mma_d,
        )  # fmt: skip
        count += 1
    for number in range(full_hi, hi):
        acc = _step(
            number, count, documents, places, bars, sizes, factor, softcap, acc, row, row_lse, row_delta, C, BLOCK, N,
            STAGES, True, LEFT, RIGHT, mma_s, mma_d,
        )  # fmt: skip
        count += 1

    t = (first + C * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma_d)))[:, None]
    d = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, mma_d))[None, :]
    value = (acc * scale).to(dq_base.dtype.element_ty)
    gl.store(dq_base + t.to(gl.int64) * stride_dqs + d, value, mask=(t < q_rows) & (d < D))


@gluon.jit
def _step(
    number, count, documents, places, bars, sizes, factor, softcap, acc, row, row_lse, row_delta, C: gl.constexpr,
    BLOCK: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr, mma_s: gl.constexpr, mma_d: gl.constexpr,
):  # fmt: skip
    """One more tile of keys."""
    q_here, do_here, k_here, v_here = places
    _own, k_full, v_full, empty = bars
    k_rows = sizes[6]
    slot = count % STAGES
    full = (count // STAGES) & 1
    k = k_here.index(slot).reshape((N, BLOCK))
    v = v_here.index(slot).reshape((N, BLOCK))
    zero = gl.zeros([64, N], gl.float32, mma_s)
    mbarrier.wait(k_full.index(slot), full)
    if MASKED and documents is not None:  # noqa: SIM102, as this is known when it compiles
        if number * N + N > k_rows:
            clear_rows(k, k_rows - number * N, BLOCK, N)
    s = warpgroup_mma(q_here.index(C).reshape((64, BLOCK)), k.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(slot), full)
    dp = warpgroup_mma(do_here.index(C).reshape((64, BLOCK)), v.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    x = s * factor
    if softcap is not None:
        t = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)
        x = t * softcap
    weights = gl.exp2(x - row_lse[:, None])
    if softcap is not None:
        weights *= 1.0 - t * t
    dp = warpgroup_mma_wait(0, deps=[dp])
    weights *= dp - row_delta[:, None]
    if MASKED:  # what is not seen may be NaN here
        j = (number * N + gl.arange(0, N, layout=gl.SliceLayout(0, mma_s)))[None, :]
        i = row[:, None] + (k_rows - sizes[4])
        seen = j < k_rows
        if RIGHT:
            seen = seen & (j <= i + sizes[8])
        if LEFT:
            seen = seen & (j > i - sizes[7])
        weights = gl.where(seen, weights, 0.0)
    ds = gl.convert_layout(weights.to(k_here.dtype), gl.DotOperandLayout(0, mma_d, 2))
    acc = warpgroup_mma(ds, k, acc, is_async=True)
    acc, ds = warpgroup_mma_wait(0, deps=[acc, ds])
    mbarrier.arrive(empty.index(slot))
    return acc
