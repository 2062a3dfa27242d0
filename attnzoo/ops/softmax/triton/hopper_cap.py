"""Weights under a softcap in the Hopper forward kernel: 2^(c * tanh(s / c)), mostly without tanh.

The unit that makes tanh makes exponentials too, and is busy for as long as the tensor cores if each score needs both.
So a polynomial takes its place on the multipliers where 64 scores of a thread lie near enough to 0, which most do:
x * (K0 + K1 x^2) for x = s / c up to 0.37, and x * (K0 + K1 x^2 + K2 x^4) up to 0.8. The relative error of both is
3e-4, while that of the unit is 5e-4. The exponentials stand in the same branch, so that one is made while another's
polynomial is computed.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

NEAR, FAR = 0.37, 0.8
SHORT = (0.9997056722640991, -0.3159478008747101)  # of least relative error up to NEAR
LONG = (0.9996967353417392, -0.3245740176520229, 0.09357506488487746)  # and up to FAR
CHAINS = 4  # of maxima, as each waits for the one before
TOGETHER = 64  # of a thread's scores; with 16 or 32 to a branch there is less to overlap


@gluon.jit
def capped_weights(s, scale, softcap):
    """Of products `s`: `scale` is over the softcap, and the `softcap` times log2(e), at most 60 of them."""
    return gl.inline_asm_elementwise(ASSEMBLY, PLACES, [s, scale, softcap], gl.float32, True, 64)


def _assembly() -> str:
    """For the results, the products in the operands that follow, then the scale and the softcap."""
    results, products = ([f"${first + n}" for n in range(TOGETHER)] for first in (0, TOGETHER))
    scale, softcap = f"${2 * TOGETHER}", f"${3 * TOGETHER}"
    most = [f"most{n}" for n in range(CHAINS)]
    lines = [".reg .pred middle, far;", f".reg .f32 {', '.join(most)}, x, y, s0, s1, l0, l1, l2;"]
    for n, s in enumerate(products):
        to = most[n % CHAINS]
        lines.append(f"abs.f32 {to}, {s};" if n < CHAINS else f"abs.f32 x, {s}; max.f32 {to}, {to}, x;")
    lines += [f"max.f32 {most[0]}, {most[0]}, {other};" for other in most[1:]]
    lines += [f"mul.f32 x, {most[0]}, {scale};"]
    lines += [f"setp.gt.f32 {name}, x, {_hex(end)};" for name, end in (("middle", NEAR), ("far", FAR))]
    # Factors of s, s^3 and s^5 instead of x's: the softcap times powers of the scale.
    lines += [f"mul.f32 x, {scale}, {scale};", f"mul.f32 l0, {scale}, {softcap};", "mul.f32 l1, l0, x;"]
    lines += ["mul.f32 l2, l1, x;"]
    lines += [f"mul.f32 s{n}, l{n}, {_hex(factor)};" for n, factor in enumerate(SHORT)]
    lines += [f"mul.f32 l{n}, l{n}, {_hex(factor)};" for n, factor in enumerate(LONG)]
    lines += ["@far bra FAR;", "@middle bra MIDDLE;"]
    short, long = "fma.rn.f32 y, x, s1, s0;", "fma.rn.f32 y, x, l2, l1; fma.rn.f32 y, y, x, l0;"
    for polynomial, after in ((short, "MIDDLE:"), (long, "FAR:")):
        for result, s in zip(results, products, strict=True):
            lines.append(f"mul.f32 x, {s}, {s}; {polynomial} mul.f32 y, y, {s}; ex2.approx.ftz.f32 {result}, y;")
        lines += ["bra DONE;", after]
    for result, s in zip(results, products, strict=True):
        lines.append(f"mul.f32 x, {s}, {scale}; tanh.approx.f32 x, x; mul.f32 y, x, {softcap};")
        lines.append(f"ex2.approx.ftz.f32 {result}, y;")
    return "{ " + " ".join(lines) + " DONE: }"


def _hex(number: float) -> str:
    """A constant of 32 bits as the assembler reads it."""
    return "0f" + struct.pack(">f", number).hex().upper()


ASSEMBLY = gl.constexpr(_assembly())
# Results must not take the place of a product that is still to be read.
PLACES = gl.constexpr(",".join(["=&r"] * TOGETHER + ["r"] * 3 * TOGETHER))
