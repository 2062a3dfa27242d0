"""The forward kernel of Hopper GPUs: FlashAttention-3's pipeline (arXiv 2407.08608) for full, causal and window masks.

One warp copies tiles by TMA. CONSUMERS groups of four warps own 64 queries each: a group multiplies its queries with
the next keys while it still multiplies probabilities with the last values, and makes exponentials meanwhile. Programs
stay: each works through a list of tiles of queries, and copies for the next one begin before the last one is written.

Gluon, and so without an interpreter: `forward.py` takes the same calls, and is what this one is tested against.
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

from attnzoo.ops.softmax.triton.hopper_steps import by_lane, in_pairs, out_of_pairs, scores_of, softmax_of, step
from attnzoo.ops.softmax.triton.hopper_tiles import clear_rows, piece_of, walk_of

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-3.0e38)  # as in `tiles.py`
UNSPECIALISED = ("heads", "group", "section", "q_len", "k_len", "tiles_each", "pieces", "window", "ahead")


@gluon.jit(do_not_specialize=UNSPECIALISED)
def hopper_forward_kernel(
    q_tiles,  # [B, Hq, Sq, D] in tiles of 64 rows
    k_tiles,  # [B, Hk, Sk, D] in tiles of N rows, and so is v
    v_tiles,
    out_tiles,  # [B, Hq, Sq, D] in tiles of 64 rows
    out,  # the same as a pointer
    lse,  # [B, Hq, Sq], fp32
    sinks,  # [Hq] or None
    documents,  # [tiles_each, 8] from `documents.py`, or None
    stride_oh,
    stride_os,
    heads,
    group,  # query heads that share a key head
    section,  # heads whose tiles are worked on side by side
    q_len,
    k_len,
    tiles_each,  # of queries, for each head
    pieces,  # tiles_each times heads times batch
    window,
    ahead,
    scale,  # of products: times log2(e), or over the softcap where there is one
    softcap,  # times log2(e), or None
    DV: gl.constexpr,
    BLOCK: gl.constexpr,  # columns of a tile
    N: gl.constexpr,  # keys in a tile
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    TURNS: gl.constexpr,  # one group's exponentials under another's products
    BOUNDED: gl.constexpr,  # scores lie within a softcap so low that exponentials need no maximum subtracted
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
):
    """Output and logsumexp in natural units."""
    dtype: gl.constexpr = q_tiles.dtype
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_here = gl.allocate_shared_memory(dtype, [2 * CONSUMERS, 1, 1, 64, BLOCK], q_tiles.layout)
    k_here = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, N, BLOCK], k_tiles.layout)
    v_here = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, N, BLOCK], v_tiles.layout)
    o_here = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, 64, BLOCK], out_tiles.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2 * CONSUMERS, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [2 * CONSUMERS, 1], bar)
    turn = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    kv_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for c in gl.static_range(2 * CONSUMERS):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(q_empty.index(c), count=1)
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(turn.index(c), count=1)
    for n in gl.static_range(STAGES):
        mbarrier.init(k_full.index(n), count=1)
        mbarrier.init(v_full.index(n), count=1)
        mbarrier.init(kv_empty.index(n), count=CONSUMERS)
    fence_async_shared()

    places = (q_here, k_here, v_here, o_here)
    bars = (q_full, q_empty, k_full, v_full, kv_empty, turn)
    sizes = (documents, heads, group, section, q_len, k_len, tiles_each, pieces, window, ahead)
    results = (out_tiles, out, lse, stride_oh, stride_os)
    # Constants have to stand in the calls themselves to stay constants.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (gl.constexpr(0), places, bars, sizes, results, sinks, scale, softcap, DV, BLOCK, N, STAGES,
                            CONSUMERS, TURNS, BOUNDED, LEFT, RIGHT)),
                (_consume, (gl.constexpr(1), places, bars, sizes, results, sinks, scale, softcap, DV, BLOCK, N, STAGES,
                            CONSUMERS, TURNS, BOUNDED, LEFT, RIGHT)),
                (_produce, (q_tiles, k_tiles, v_tiles, places, bars, sizes, N, STAGES, CONSUMERS, LEFT, RIGHT)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (gl.constexpr(0), places, bars, sizes, results, sinks, scale, softcap, DV, BLOCK, N, STAGES,
                            CONSUMERS, TURNS, BOUNDED, LEFT, RIGHT)),
                (_consume, (gl.constexpr(1), places, bars, sizes, results, sinks, scale, softcap, DV, BLOCK, N, STAGES,
                            CONSUMERS, TURNS, BOUNDED, LEFT, RIGHT)),
                (_consume, (gl.constexpr(2), places, bars, sizes, results, sinks, scale, softcap, DV, BLOCK, N, STAGES,
                            CONSUMERS, TURNS, BOUNDED, LEFT, RIGHT)),
                (_produce, (q_tiles, k_tiles, v_tiles, places, bars, sizes, N, STAGES, CONSUMERS, LEFT, RIGHT)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )  # fmt: skip


@gluon.jit
def _produce(
    q_tiles, k_tiles, v_tiles, places, bars, sizes, N: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """Copies every tile that the consumers will read, as soon as there is room for it."""
    q_here, k_here, v_here, _o_here = places
    q_full, q_empty, k_full, v_full, kv_empty, _turn = bars
    M: gl.constexpr = 64 * CONSUMERS
    done = 0  # tiles of queries
    count = 0  # tiles of keys
    for work in range(gl.program_id(0), sizes[7], gl.num_programs(0)):
        head, batch, first, q_start, q_rows, k_start, k_rows = piece_of(work, sizes, M)
        if first < q_rows:
            lo, _full_lo, _full_hi, hi = walk_of(first, q_rows, k_rows, sizes, M, N, LEFT, RIGHT)
            head_k = head // sizes[2]
            for c in gl.static_range(CONSUMERS):
                own = done % 2 * CONSUMERS + c
                mbarrier.wait(q_empty.index(own), ((done // 2) & 1) ^ 1)
                mbarrier.expect(q_full.index(own), q_tiles.block_type.nbytes)
                at = [batch, head, q_start + first + c * 64, 0]
                tma.async_copy_global_to_shared(q_tiles, at, q_full.index(own), q_here.index(own))
            for n in range(hi - lo):
                at = [batch, head_k, k_start + (hi - 1 - n) * N, 0]
                slot = count % STAGES
                mbarrier.wait(kv_empty.index(slot), ((count // STAGES) & 1) ^ 1)
                mbarrier.expect(k_full.index(slot), k_tiles.block_type.nbytes)
                tma.async_copy_global_to_shared(k_tiles, at, k_full.index(slot), k_here.index(slot))
                mbarrier.wait(kv_empty.index((count + 1) % STAGES), (((count + 1) // STAGES) & 1) ^ 1)
                mbarrier.expect(v_full.index(slot), v_tiles.block_type.nbytes)
                tma.async_copy_global_to_shared(v_tiles, at, v_full.index(slot), v_here.index(slot))
                count += 1
            done += 1


@gluon.jit
def _consume(
    C: gl.constexpr, places, bars, sizes, results, sinks, scale, softcap, DV: gl.constexpr, BLOCK: gl.constexpr,
    N: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, TURNS: gl.constexpr, BOUNDED: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """Group C of 64 queries in each tile."""
    q_here, k_here, v_here, o_here = places
    q_full, q_empty, k_full, v_full, kv_empty, _turn = bars
    out_tiles, out, lse, stride_oh, stride_os = results
    M: gl.constexpr = 64 * CONSUMERS
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, mma_s)
    done = 0
    count = 0
    steps = 0
    for work in range(gl.program_id(0), sizes[7], gl.num_programs(0)):
        head, batch, first, q_start, q_rows, _k_start, k_rows = piece_of(work, sizes, M)
        if first < q_rows:
            lo, full_lo, full_hi, hi = walk_of(first, q_rows, k_rows, sizes, M, N, LEFT, RIGHT)
            row = first + C * 64 + gl.arange(0, 64, layout=by_row)
            i = row + (k_rows - q_rows)
            own = done % 2 * CONSUMERS + C
            q = q_here.index(own).reshape((64, BLOCK))
            mbarrier.wait(q_full.index(own), (done // 2) & 1)

            # The first tile has no product of values to hide behind.
            s = warpgroup_mma_wait(0, deps=[scores_of(q, k_here, k_full, count, BLOCK, N, STAGES, mma_s)])
            mbarrier.arrive(kv_empty.index(count % STAGES))
            if sizes[0] is not None:  # noqa: SIM102, as this is known when it compiles
                if hi * N > k_rows:
                    slot = count % STAGES
                    mbarrier.wait(v_full.index(slot), (count // STAGES) & 1)
                    clear_rows(v_here.index(slot).reshape((N, BLOCK)), k_rows - (hi - 1) * N, BLOCK, N)
            top = gl.full([64], 0.0 if BOUNDED else LOWEST, gl.float32, by_row)
            if BOUNDED:
                total = gl.zeros_like(by_lane(s, N))
            else:
                total = gl.zeros([64], gl.float32, by_row)
            weights, top, total, _shrink = softmax_of(
                s, hi - 1, i, k_rows, sizes, scale, softcap, top, total, N, BOUNDED, True, LEFT, RIGHT, mma_s
            )
            p = in_pairs(weights, v_here.dtype, N)
            acc = gl.zeros([64, BLOCK], gl.float32, mma_o)
            count += 1
            for number in range(hi - 2, gl.maximum(full_hi, lo) - 1, -1):
                p, acc, top, total = step(
                    number, count, steps, q, k_here, v_here, bars, p, acc, top, total, i, k_rows, sizes, scale,
                    softcap, C, BLOCK, N, STAGES, CONSUMERS, TURNS, BOUNDED, True, LEFT, RIGHT, mma_s, mma_o,
                )  # fmt: skip
                count += 1
                steps += 1
            for number in range(gl.minimum(full_hi, hi - 1) - 1, full_lo - 1, -1):
                p, acc, top, total = step(
                    number, count, steps, q, k_here, v_here, bars, p, acc, top, total, i, k_rows, sizes, scale,
                    softcap, C, BLOCK, N, STAGES, CONSUMERS, TURNS, BOUNDED, False, LEFT, RIGHT, mma_s, mma_o,
                )  # fmt: skip
                count += 1
                steps += 1
            if LEFT:
                for number in range(gl.minimum(full_lo, hi - 1) - 1, lo - 1, -1):
                    p, acc, top, total = step(
                        number, count, steps, q, k_here, v_here, bars, p, acc, top, total, i, k_rows, sizes, scale,
                        softcap, C, BLOCK, N, STAGES, CONSUMERS, TURNS, BOUNDED, True, LEFT, RIGHT, mma_s, mma_o,
                    )  # fmt: skip
                    count += 1
                    steps += 1
            mbarrier.arrive(q_empty.index(own))
            last = (count - 1) % STAGES
            mbarrier.wait(v_full.index(last), ((count - 1) // STAGES) & 1)
            p = out_of_pairs(p, v_here.dtype, N, mma_o)
            acc = warpgroup_mma(p, v_here.index(last).reshape((N, BLOCK)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])

            if BOUNDED:
                total = gl.convert_layout(gl.sum(total, 1), by_row)
            blind = total == 0.0
            if sinks is not None:
                sink = gl.load(sinks + head).to(gl.float32) * LOG2E
                higher = gl.maximum(top, sink)
                shrink = gl.exp2(top - higher)
                total = total * shrink + gl.exp2(sink - higher)
                acc *= gl.convert_layout(shrink, gl.SliceLayout(1, mma_o))[:, None]
                top = higher
            total = gl.where(blind, 1.0, total)
            acc *= gl.convert_layout(gl.where(blind, 0.0, 1.0 / total), gl.SliceLayout(1, mma_o))[:, None]
            row_lse = gl.where(blind, float("-inf"), (top + gl.log2(total)) * LN2)
            base = (batch * sizes[1] + head).to(gl.int64) * sizes[4] + q_start
            gl.store(lse + base + row, row_lse, mask=row < q_rows)
            tma.store_wait(0)
            place = o_here.index(C).reshape((64, BLOCK))
            place.store(acc.to(o_here.dtype))
            if sizes[0] is None or first + C * 64 + 64 <= q_rows:
                fence_async_shared()
                tma.async_copy_shared_to_global(out_tiles, [batch, head, q_start + first + C * 64, 0], o_here.index(C))
            else:  # rows after the last are another document's
                wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK, BLOCK // 8], [4, 1], [1, 0])
                rows = first + C * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, wide))
                d = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, wide))[None, :]
                at = out + head.to(gl.int64) * stride_oh + (q_start + rows).to(gl.int64)[:, None] * stride_os + d
                gl.store(at, place.load(wide), mask=(rows < q_rows)[:, None] & (d < DV))
            done += 1
    tma.store_wait(0)
