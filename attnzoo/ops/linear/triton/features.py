"""Feature maps in kernels, and loads that apply them."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from attnzoo.ops.linear.triton.tiles import load_tile, row_mask


@triton.jit
def apply_map(x, MAP: tl.constexpr):
    """elu(x) + 1, relu(x), or x, in x's own dtype."""
    if MAP == "elu":
        if x.dtype == tl.bfloat16:
            x = elu_of_pairs(x)
        else:
            x = tl.where(x > 0, x + 1, tl.exp2(x * 1.4426950408889634))
    if MAP == "relu":
        x = tl.maximum(x, 0.0).to(x.dtype)
    return x


@triton.jit
def elu_of_pairs(x):
    """elu(x) + 1 of bf16: the lesser of e^x and max(x, 0) + 1, two numbers an instruction but for the exponentials.

    Said to be impure, or else the compiler maps anew for every layout in which a product wants the features. Where the
    GPU here is a Blackwell it is pure, as the pipeliner for those takes nothing else.
    """
    return tl.inline_asm_elementwise(
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
        dtype=tl.bfloat16,
        is_pure=cuda_capability_geq(10, 0),
        pack=2,
    )


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
    FULL: tl.constexpr,
    MAP: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """As `load_tile`, mapped, in COMPUTE; map(0) outside the rows, and 0 beyond `width`."""
    x = load_tile(base, stride, first, low, high, width, ROWS, BLOCK, EVEN, FULL).to(COMPUTE)
    x = apply_map(x, MAP)
    if MAP == "elu" and not EVEN:
        x = tl.where((tl.arange(0, BLOCK) < width)[None, :], x, 0.0).to(COMPUTE)
    return x


@triton.jit
def load_late_features(
    base,
    stride,
    first,
    low,
    high,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    FULL: tl.constexpr,
    MAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    LATE: tl.constexpr,
):
    """As `load_features`; if LATE 0 outside the rows [low, high): before a sequence's first far key there are none."""
    x = load_features(base, stride, first, low, high, width, ROWS, BLOCK, EVEN, FULL, MAP, COMPUTE)
    if LATE:
        x = tl.where(row_mask(first, low, high, ROWS)[:, None], x, 0.0).to(COMPUTE)
    return x


@triton.jit
def times_slope(d, features, MAP: tl.constexpr):
    """`d` times the map's derivative, which its own value tells."""
    if MAP == "elu":
        d = d * tl.minimum(features.to(tl.float32), 1.0)
    if MAP == "relu":
        d = tl.where(features > 0, d, 0.0)
    return d
