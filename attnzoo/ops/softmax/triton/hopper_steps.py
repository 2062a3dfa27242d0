"""One step of the Hopper forward kernel: products of one tile of keys, and what a softmax makes of them."""

# mypy: disable-error-code="no-untyped-def"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from attnzoo.ops.softmax.triton.hopper_cap import capped


@gluon.jit
def step(
    number, count, steps, q, k_here, v_here, bars, p, acc, top, total, i, k_rows, sizes, scale, softcap,
    C: gl.constexpr, BLOCK: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    TURNS: gl.constexpr, BOUNDED: gl.constexpr, MASKED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    mma_s: gl.constexpr, mma_o: gl.constexpr,
):  # fmt: skip
    """Products and weights of one more tile of keys, while those of the last one are multiplied with the values."""
    _q_full, _q_empty, k_full, v_full, kv_empty, turn = bars
    if TURNS:
        mbarrier.wait(turn.index(C), (steps & 1) ^ (1 if C == 0 else 0))
    s = scores_of(q, k_here, k_full, count, BLOCK, N, STAGES, mma_s)
    last = (count - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((count - 1) // STAGES) & 1)
    p = out_of_pairs(p, v_here.dtype, N, mma_o)
    acc = warpgroup_mma(p, v_here.index(last).reshape((N, BLOCK)), acc, is_async=True)
    if TURNS:
        mbarrier.arrive(turn.index((C + 1) % CONSUMERS))
    s = warpgroup_mma_wait(1, deps=[s])
    weights, top, total, shrink = softmax_of(
        s, number, i, k_rows, sizes, scale, softcap, top, total, N, BOUNDED, MASKED, LEFT, RIGHT, mma_s
    )
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(kv_empty.index(count % STAGES))
    if not BOUNDED:
        acc *= gl.convert_layout(shrink, gl.SliceLayout(1, mma_o))[:, None]
    p = in_pairs(weights, v_here.dtype, N)
    return p, acc, top, total


@gluon.jit
def scores_of(
    q, k_here, k_full, count, BLOCK: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, mma_s: gl.constexpr
):
    """Products of the queries with the `count`-th tile of keys, as they begin."""
    slot = count % STAGES
    mbarrier.wait(k_full.index(slot), (count // STAGES) & 1)
    k = k_here.index(slot).reshape((N, BLOCK)).permute((1, 0))
    return warpgroup_mma(q, k, gl.zeros([64, N], gl.float32, mma_s), use_acc=False, is_async=True)


@gluon.jit
def softmax_of(
    s, number, i, k_rows, sizes, scale, softcap, top, total, N: gl.constexpr, BOUNDED: gl.constexpr,
    MASKED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, mma_s: gl.constexpr,
):  # fmt: skip
    """Unscaled weights of the keys of tile `number`; each row's greatest score and sum; what the old ones shrink by.

    BOUNDED sums are kept by lane, as nothing but the end asks for the whole.
    """
    if softcap is not None:
        s = capped(s, scale, softcap)
        scale = 1.0
    if MASKED:
        j = (number * N + gl.arange(0, N, layout=gl.SliceLayout(0, mma_s)))[None, :]
        seen = j < k_rows
        if RIGHT:
            seen = seen & (j <= i[:, None] + sizes[9])
        if LEFT:
            seen = seen & (j > i[:, None] - sizes[8])
        s = gl.where(seen, s, float("-inf"))
    shrink = top
    if BOUNDED:
        weights = gl.exp2(s * scale)
        total = total + by_lane(weights, N)
    else:
        higher = gl.maximum(top, gl.max(s, 1) * scale)
        weights = gl.exp2(s * scale - higher[:, None])
        shrink = gl.exp2(top - higher)
        total = total * shrink + gl.sum(weights, 1)
        top = higher
    return weights, top, total, shrink


@gluon.jit
def by_lane(weights, N: gl.constexpr):
    """Sums of `[64, N]` numbers over the columns that are in one thread."""
    return gl.sum(weights.reshape((64, N // 8, 8)), 1)


@gluon.jit
def in_pairs(weights, dtype: gl.constexpr, N: gl.constexpr):
    """`[64, N]` numbers as N / 2 registers of two: carried from step to step one by one, they would be packed there."""
    a, b = gl.split(weights.reshape((64, N // 2, 2)))
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [a, b], gl.int32, True, 1)
    return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [a, b], gl.int32, True, 1)


@gluon.jit
def out_of_pairs(p, dtype: gl.constexpr, N: gl.constexpr, mma_o: gl.constexpr):
    """The same as the left operand of a product, which takes these registers as they are."""
    a = p.to(gl.int16).to(dtype, bitcast=True)
    b = (p >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.convert_layout(gl.join(a, b).reshape((64, N)), gl.DotOperandLayout(0, mma_o, 2), assert_trivial=True)
