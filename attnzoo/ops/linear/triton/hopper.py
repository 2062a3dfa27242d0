"""The forward of causal linear attention on Hopper GPUs, for heads of 64 in bf16 and sequences of whole chunks.

A program walks over the chunks of a part as `kernels_forward.attend` does. What takes the time there is that each
product waits for the last one; here a chunk's products with keys, state and normaliser and the state's own update begin
together, and the normaliser's sums are made meanwhile. Tiles are copied by TMA, and mapped where they then are.

Programs begin beside the one that sums the parts: those of first parts need no sums, and the others copy their first
tiles before they wait for them.

Gluon, and so without an interpreter: `attend` takes the same calls, and is what this one is tested against.
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

SYNCHRONISE = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # as Triton 3.6 calls it


@gluon.jit(do_not_specialize=("heads", "group", "length", "parts", "part"))
def hopper_attend(
    q_tiles,  # [B, Hq, S, D] in tiles of 64 rows, and so are k, v and out
    k_tiles,
    v_tiles,
    out_tiles,
    inverses,  # [B, Hq, S], fp32
    s0,  # [B, Hk, 64, 64], fp32, or None
    z0,
    sums,  # [B * parts, Hk, 64, 64], fp32, or None
    z_sums,
    s1,  # [B, Hk, 64, 64], fp32
    z1,
    heads,
    group,
    length,
    parts,
    part,
    scale,
    NORMALIZE: gl.constexpr,
    MAP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """out, 1 / the normaliser, and the last state."""
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    mma_z: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_here = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, 1, 64, 64], q_tiles.layout)
    k_here = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, 1, 64, 64], k_tiles.layout)
    v_here = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, 1, 64, 64], v_tiles.layout)
    o_here = gl.allocate_shared_memory(gl.bfloat16, [1, 1, 64, 64], out_tiles.layout)
    s_here = gl.allocate_shared_memory(gl.bfloat16, [64, 64], swizzled)
    z_here = gl.allocate_shared_memory(gl.bfloat16, [16, 64], swizzled)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for n in gl.static_range(STAGES):
        mbarrier.init(full.index(n), count=1)
    fence_async_shared()

    row = gl.program_id(0) // heads
    q_head = gl.program_id(0) % heads
    place = gl.program_id(1)  # the first parts of all sequences come first
    head = q_head // group
    kv_heads = heads // group
    start = place * part
    chunks = gl.minimum(part, length - start) // 64
    places = (q_here, k_here, v_here)
    tiles = (q_tiles, k_tiles, v_tiles)
    for n in gl.static_range(STAGES - 1):
        if n < chunks:
            _fetch(tiles, places, full, n, row, q_head, head, start, STAGES)

    v_rows = gl.arange(0, 64, layout=gl.SliceLayout(1, mma))[:, None]
    d_columns = gl.arange(0, 64, layout=gl.SliceLayout(0, mma))[None, :]
    z_rows = gl.arange(0, 16, layout=gl.SliceLayout(1, wide))[:, None]
    z_columns = gl.arange(0, 64, layout=gl.SliceLayout(0, wide))
    s = gl.zeros([64, 64], gl.float32, mma)  # transposed: [values, features]
    before = gl.zeros([64], gl.float32, gl.SliceLayout(0, wide))
    inside = d_columns * 64 + v_rows
    if s0 is not None:
        index = (row * kv_heads + head).to(gl.int64)
        s = gl.load(s0 + index * 4096 + inside)
        if NORMALIZE:
            before = gl.load(z0 + index * 64 + z_columns)
    if sums is not None:
        if place > 0:
            gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], gl.int32, False, 1)
        for earlier in range(0, place):
            index = ((row * parts + earlier) * kv_heads + head).to(gl.int64)
            s += gl.load(sums + index * 4096 + inside)
            if NORMALIZE:
                before += gl.load(z_sums + index * 64 + z_columns)
    z = gl.where(z_rows == 0, before[None, :], gl.zeros([16, 64], gl.float32, wide))  # rows that sum to it

    q_place = gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    k_place = gl.arange(0, 64, layout=gl.SliceLayout(0, mma))
    seen = q_place[:, None] >= k_place[None, :]
    inverses += (row * heads + q_head).to(gl.int64) * length + start
    for n in range(chunks):
        slot = n % STAGES
        mbarrier.wait(full.index(slot), (n // STAGES) & 1)
        q = q_here.index(slot).reshape((64, 64))
        k = k_here.index(slot).reshape((64, 64))
        v = v_here.index(slot).reshape((64, 64))
        keys = k.load(wide)
        if MAP != "identity":
            queries = _map(q.load(wide), MAP)
            keys = _map(keys, MAP)
            k.store(keys)
            q.store(queries)
        s_here.store(s.to(gl.bfloat16))
        if NORMALIZE:
            z_here.store(z.to(gl.bfloat16))
        fence_async_shared()
        SYNCHRONISE()
        weights = gl.zeros([64, 64], gl.float32, mma)
        weights = warpgroup_mma(q, k.permute((1, 0)), weights, use_acc=False, is_async=True)
        read = gl.zeros([64, 64], gl.float32, mma)
        read = warpgroup_mma(q, s_here.permute((1, 0)), read, use_acc=False, is_async=True)
        if NORMALIZE:
            total = gl.zeros([64, 16], gl.float32, mma_z)
            total = warpgroup_mma(q, z_here.permute((1, 0)), total, use_acc=False, is_async=True)
        s = warpgroup_mma(v.permute((1, 0)), k, s, is_async=True)
        if n + STAGES - 1 < chunks:
            _fetch(tiles, places, full, n + STAGES - 1, row, q_head, head, start, STAGES)
        if NORMALIZE:
            z += gl.convert_layout(gl.sum(keys.reshape((4, 16, 64)).to(gl.float32), 0), wide)
            weights, read, total, s = warpgroup_mma_wait(0, deps=(weights, read, total, s))
        else:
            weights, read, s = warpgroup_mma_wait(0, deps=(weights, read, s))
        weights = gl.where(seen, weights, 0.0)
        near = gl.convert_layout(weights.to(gl.bfloat16), gl.DotOperandLayout(0, mma, 2))
        read = warpgroup_mma(near, v, read, is_async=True)
        rows = n * 64 + gl.arange(0, 64, layout=by_row)
        if NORMALIZE:
            weight = gl.sum(weights, 1) + gl.convert_layout(gl.sum(total, 1), by_row)
            inverse = gl.where(weight == 0.0, 0.0, 1.0 / gl.where(weight == 0.0, 1.0, weight))
            gl.store(inverses + rows, inverse)
            read = warpgroup_mma_wait(0, deps=[read]) * inverse[:, None]
        else:
            read = warpgroup_mma_wait(0, deps=[read]) * scale
        tma.store_wait(0)
        o_here.reshape((64, 64)).store(read.to(gl.bfloat16))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_tiles, [row, q_head, start + n * 64, 0], o_here)
    if (place == parts - 1) & (q_head % group == 0):
        index = (row * kv_heads + head).to(gl.int64)
        gl.store(s1 + index * 4096 + inside, s)
        if NORMALIZE:
            gl.store(z1 + index * 64 + z_columns, gl.sum(z, 0))
    tma.store_wait(0)


@gluon.jit
def _fetch(tiles, places, full, n, row, q_head, head, start, STAGES: gl.constexpr):
    """Begin to copy the n-th chunk."""
    q_tiles, k_tiles, v_tiles = tiles
    q_here, k_here, v_here = places
    slot = n % STAGES
    first = start + n * 64
    mbarrier.expect(full.index(slot), 3 * q_tiles.block_type.nbytes)
    tma.async_copy_global_to_shared(q_tiles, [row, q_head, first, 0], full.index(slot), q_here.index(slot))
    tma.async_copy_global_to_shared(k_tiles, [row, head, first, 0], full.index(slot), k_here.index(slot))
    tma.async_copy_global_to_shared(v_tiles, [row, head, first, 0], full.index(slot), v_here.index(slot))


@gluon.jit
def _map(x, MAP: gl.constexpr):
    """elu(x) + 1, relu(x), or x; as in `features.py`."""
    if MAP == "elu":
        x = gl.inline_asm_elementwise(
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
            dtype=gl.bfloat16,
            is_pure=False,
            pack=2,
        )
    if MAP == "relu":
        x = gl.maximum(x, 0.0).to(gl.bfloat16)
    return x
