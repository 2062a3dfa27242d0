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
    q_here = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, 64, BLOCK], q_tiles.layout)
    k_here = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, N, BLOCK], k_tiles.layout)
    v_here = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, N, BLOCK], v_tiles.layout)
    o_here = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, 64, BLOCK], out_tiles.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], bar)
    turn = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(q_empty.index(c), count=1)
        mbarrier.init(turn.index(c), count=1)
    for n in gl.static_range(STAGES):
        mbarrier.init(k_full.index(n), count=1)
        mbarrier.init(v_full.index(n), count=1)
        mbarrier.init(k_empty.index(n), count=CONSUMERS)
        mbarrier.init(v_empty.index(n), count=CONSUMERS)
    fence_async_shared()

    places = (q_here, k_here, v_here, o_here)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turn)
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
def _piece(work, sizes, M: gl.constexpr):
    """The `work`-th piece: head, batch entry, its first row of queries, and the sequence that it is of: first rows and
    numbers of rows of its queries and keys.

    Late tiles come first, which see the most keys, and heads of a section side by side, which find their keys in L2.
    """
    documents, heads, _group, section, q_len, k_len, tiles_each, pieces, _window, _ahead = sizes
    # Every second round backwards: who had a long piece gets a short one.
    programs = gl.num_programs(0)
    begin = work // programs * programs
    if work // programs % 2 == 1:
        work = begin + gl.minimum(programs, pieces - begin) - 1 - (work - begin)
    rest = work % (tiles_each * section)
    row_of_heads = work // (tiles_each * section) * section + rest % section
    tile = tiles_each - 1 - rest // section
    first = tile * M
    q_start = 0
    q_rows = q_len
    k_start = 0
    k_rows = k_len
    if documents is not None:
        entry = documents + tile * 8
        first = gl.load(entry)
        q_start = gl.load(entry + 1)
        q_rows = gl.load(entry + 2)
        k_start = gl.load(entry + 3)
        k_rows = gl.load(entry + 4)
    return row_of_heads % heads, row_of_heads // heads, first, q_start, q_rows, k_start, k_rows


@gluon.jit
def _walk(first, q_rows, k_rows, sizes, M: gl.constexpr, N: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """Tiles of keys [lo, hi), at least one, that hold all that M queries see, and [full_lo, full_hi) seen whole."""
    window = sizes[8]
    ahead = sizes[9]
    position = first + k_rows - q_rows
    lo = 0
    full_lo = 0
    hi = gl.cdiv(k_rows, N)
    full_hi = k_rows // N
    if LEFT:
        lo = gl.minimum(gl.maximum(position - window + 1, 0) // N, gl.maximum(hi - 1, 0))
        full_lo = gl.cdiv(gl.maximum(position + M - window, 0), N)
    if RIGHT:
        hi = gl.minimum(hi, gl.cdiv(gl.maximum(position + M + ahead, 0), N))
        full_hi = gl.minimum(full_hi, gl.maximum(position + ahead + 1, 0) // N)
    hi = gl.maximum(hi, lo + 1)
    full_lo = gl.minimum(gl.maximum(full_lo, lo), hi)
    full_hi = gl.maximum(full_hi, full_lo)
    return lo, full_lo, full_hi, hi


@gluon.jit
def _produce(
    q_tiles, k_tiles, v_tiles, places, bars, sizes, N: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """Copies every tile that the consumers will read, as soon as there is room for it."""
    q_here, k_here, v_here, _o_here = places
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _turn = bars
    M: gl.constexpr = 64 * CONSUMERS
    done = 0  # tiles of queries
    count = 0  # tiles of keys
    for work in range(gl.program_id(0), sizes[7], gl.num_programs(0)):
        head, batch, first, q_start, q_rows, k_start, k_rows = _piece(work, sizes, M)
        if first < q_rows:
            lo, _full_lo, _full_hi, hi = _walk(first, q_rows, k_rows, sizes, M, N, LEFT, RIGHT)
            head_k = head // sizes[2]
            for c in gl.static_range(CONSUMERS):
                mbarrier.wait(q_empty.index(c), (done & 1) ^ 1)
                mbarrier.expect(q_full.index(c), q_tiles.block_type.nbytes)
                at = [batch, head, q_start + first + c * 64, 0]
                tma.async_copy_global_to_shared(q_tiles, at, q_full.index(c), q_here.index(c))
            for n in range(hi - lo):
                at = [batch, head_k, k_start + (hi - 1 - n) * N, 0]
                slot = count % STAGES
                free = ((count // STAGES) & 1) ^ 1
                mbarrier.wait(k_empty.index(slot), free)
                mbarrier.expect(k_full.index(slot), k_tiles.block_type.nbytes)
                tma.async_copy_global_to_shared(k_tiles, at, k_full.index(slot), k_here.index(slot))
                mbarrier.wait(v_empty.index(slot), free)
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
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _turn = bars
    out_tiles, out, lse, stride_oh, stride_os = results
    M: gl.constexpr = 64 * CONSUMERS
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, mma_s)
    q = q_here.index(C).reshape((64, BLOCK))
    done = 0
    count = 0
    steps = 0
    for work in range(gl.program_id(0), sizes[7], gl.num_programs(0)):
        head, batch, first, q_start, q_rows, _k_start, k_rows = _piece(work, sizes, M)
        if first < q_rows:
            lo, full_lo, full_hi, hi = _walk(first, q_rows, k_rows, sizes, M, N, LEFT, RIGHT)
            row = first + C * 64 + gl.arange(0, 64, layout=by_row)
            i = row + (k_rows - q_rows)
            mbarrier.wait(q_full.index(C), done & 1)

            # The first tile has no product of values to hide behind.
            s = warpgroup_mma_wait(0, deps=[_scores(q, k_here, k_full, count, BLOCK, N, STAGES, mma_s)])
            mbarrier.arrive(k_empty.index(count % STAGES))
            if sizes[0] is not None:  # noqa: SIM102, as this is known when it compiles
                if hi * N > k_rows:
                    _clear(v_here, v_full, count, k_rows - (hi - 1) * N, BLOCK, N, STAGES)
            top = gl.full([64], 0.0 if BOUNDED else LOWEST, gl.float32, by_row)
            total = gl.zeros([64], gl.float32, by_row)
            weights, top, total, _shrink = _softmax(
                s, hi - 1, i, k_rows, sizes, scale, softcap, top, total, N, BOUNDED, True, LEFT, RIGHT, mma_s
            )
            p = gl.convert_layout(weights.to(v_here.dtype), gl.DotOperandLayout(0, mma_o, 2))
            acc = gl.zeros([64, BLOCK], gl.float32, mma_o)
            count += 1
            for number in range(hi - 2, gl.maximum(full_hi, lo) - 1, -1):
                p, acc, top, total = _step(
                    number, count, steps, q, k_here, v_here, bars, p, acc, top, total, i, k_rows, sizes, scale,
                    softcap, C, BLOCK, N, STAGES, CONSUMERS, TURNS, BOUNDED, True, LEFT, RIGHT, mma_s, mma_o,
                )  # fmt: skip
                count += 1
                steps += 1
            for number in range(gl.minimum(full_hi, hi - 1) - 1, full_lo - 1, -1):
                p, acc, top, total = _step(
                    number, count, steps, q, k_here, v_here, bars, p, acc, top, total, i, k_rows, sizes, scale,
                    softcap, C, BLOCK, N, STAGES, CONSUMERS, TURNS, BOUNDED, False, LEFT, RIGHT, mma_s, mma_o,
                )  # fmt: skip
                count += 1
                steps += 1
            if LEFT:
                for number in range(gl.minimum(full_lo, hi - 1) - 1, lo - 1, -1):
                    p, acc, top, total = _step(
                        number, count, steps, q, k_here, v_here, bars, p, acc, top, total, i, k_rows, sizes, scale,
                        softcap, C, BLOCK, N, STAGES, CONSUMERS, TURNS, BOUNDED, True, LEFT, RIGHT, mma_s, mma_o,
                    )  # fmt: skip
                    count += 1
                    steps += 1
            mbarrier.arrive(q_empty.index(C))
            last = (count - 1) % STAGES
            mbarrier.wait(v_full.index(last), ((count - 1) // STAGES) & 1)
            acc = warpgroup_mma(p, v_here.index(last).reshape((N, BLOCK)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(last))

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


@gluon.jit
def _scores(q, k_here, k_full, count, BLOCK: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, mma_s: gl.constexpr):
    """Products of the queries with the `count`-th tile of keys, as they begin."""
    slot = count % STAGES
    mbarrier.wait(k_full.index(slot), (count // STAGES) & 1)
    k = k_here.index(slot).reshape((N, BLOCK)).permute((1, 0))
    return warpgroup_mma(q, k, gl.zeros([64, N], gl.float32, mma_s), use_acc=False, is_async=True)


@gluon.jit
def _step(
    number, count, steps, q, k_here, v_here, bars, p, acc, top, total, i, k_rows, sizes, scale, softcap,
    C: gl.constexpr, BLOCK: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    TURNS: gl.constexpr, BOUNDED: gl.constexpr, MASKED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    mma_s: gl.constexpr, mma_o: gl.constexpr,
):  # fmt: skip
    """Products and weights of one more tile of keys, while those of the last one are multiplied with the values."""
    _q_full, _q_empty, k_full, k_empty, v_full, v_empty, turn = bars
    if TURNS:
        mbarrier.wait(turn.index(C), (steps & 1) ^ (1 if C == 0 else 0))
    s = _scores(q, k_here, k_full, count, BLOCK, N, STAGES, mma_s)
    last = (count - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((count - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, v_here.index(last).reshape((N, BLOCK)), acc, is_async=True)
    if TURNS:
        mbarrier.arrive(turn.index((C + 1) % CONSUMERS))
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_empty.index(count % STAGES))
    weights, top, total, shrink = _softmax(
        s, number, i, k_rows, sizes, scale, softcap, top, total, N, BOUNDED, MASKED, LEFT, RIGHT, mma_s
    )
    total = _made_by_now(total)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(v_empty.index(last))
    if not BOUNDED:
        acc *= gl.convert_layout(shrink, gl.SliceLayout(1, mma_o))[:, None]
    p = gl.convert_layout(weights.to(v_here.dtype), gl.DotOperandLayout(0, mma_o, 2))
    return p, acc, top, total


@gluon.jit
def _softmax(
    s, number, i, k_rows, sizes, scale, softcap, top, total, N: gl.constexpr, BOUNDED: gl.constexpr,
    MASKED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, mma_s: gl.constexpr,
):  # fmt: skip
    """Unscaled weights of the keys of tile `number`; each row's greatest score and sum; what the old ones shrink by."""
    if softcap is not None:
        s = gl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=r,r", [s * scale], dtype=gl.float32, is_pure=True, pack=1
        )
        scale = softcap
    if MASKED:
        j = (number * N + gl.arange(0, N, layout=gl.SliceLayout(0, mma_s)))[None, :]
        seen = j < k_rows
        if RIGHT:
            seen = seen & (j <= i[:, None] + sizes[9])
        if LEFT:
            seen = seen & (j > i[:, None] - sizes[8])
        s = gl.where(seen, s, float("-inf"))
    shrink = total
    if BOUNDED:
        weights = gl.exp2(s * scale)
        total = total + gl.sum(weights, 1)
    else:
        higher = gl.maximum(top, gl.max(s, 1) * scale)
        weights = gl.exp2(s * scale - higher[:, None])
        shrink = gl.exp2(top - higher)
        total = total * shrink + gl.sum(weights, 1)
        top = higher
    return weights, top, total, shrink


@gluon.jit
def _made_by_now(total):
    """The same numbers, made before whatever comes next.

    The assembler moves arithmetic behind a wait for products that it does not depend on, and with it all exponentials
    from under these products. It moves nothing that a branch depends on: this one never sleeps, as no sum of
    exponentials is negative.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .f32 both; .reg .pred never; add.f32 both, $2, $3; setp.lt.f32 never, both, 0f00000000;"
        " @never nanosleep.u32 1; mov.b32 $0, $2; mov.b32 $1, $3; }",
        "=&r,=&r,r,r", [total], dtype=gl.float32, is_pure=False, pack=2,
    )  # fmt: skip


@gluon.jit
def _clear(v_here, v_full, count, rows, BLOCK: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr):
    """Zeros in place of a tile's values from `rows` on: they are another document's, or nobody's, and may be NaN.

    Each group does it for itself; what both write is the same.
    """
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK, BLOCK // 8], [4, 1], [1, 0])
    slot = count % STAGES
    mbarrier.wait(v_full.index(slot), (count // STAGES) & 1)
    place = v_here.index(slot).reshape((N, BLOCK))
    there = gl.arange(0, N, layout=gl.SliceLayout(1, wide)) < rows
    values = place.load(wide)
    place.store(gl.where(there[:, None], values, gl.zeros_like(values)))
    fence_async_shared()
