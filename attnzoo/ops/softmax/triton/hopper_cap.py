"""The softcap of the Hopper forward kernel: c * tanh(s / c), mostly without tanh.

The unit that makes tanh makes exponentials too, and is busy for as long as the tensor cores if each score needs both.
So a polynomial takes its place on the multipliers where 64 scores of a thread lie near enough to 0, which most do:
x * (K0 + K1 x^2) for x = s / c up to 0.37, and x * (K0 + K1 x^2 + K2 x^4) up to 0.8. The relative error of both is
3e-4, while that of the unit is 5e-4.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

NEAR, FAR = 0.37, 0.8
SHORT = (0.9997056722640991, -0.3159478008747101)  # of least relative error up to NEAR
LONG = (0.9996967353417392, -0.3245740176520229, 0.09357506488487746)  # and up to FAR
TOGETHER = 64  # of a thread's scores; with 16 or 32 to a branch there is less to overlap


@gluon.jit
def capped(s, scale, softcap):
    """Scores of products `s`: `scale` is over the softcap, and the `softcap` in the units that scores come in."""
    return gl.inline_asm_elementwise(ASSEMBLY, PLACES, [s, scale, softcap], gl.float32, True, 64)


def _assembly() -> str:
    """For the results, the products in the operands that follow, then the scale and the softcap."""
    products = [f"${TOGETHER + n}" for n in range(TOGETHER)]
    scale, softcap = f"${2 * TOGETHER}", f"${3 * TOGETHER}"
    lines = [".reg .pred middle, far;", ".reg .f32 most, x, y, s0, s1, l0, l1, l2;", f"abs.f32 most, {products[0]};"]
    lines += [f"abs.f32 x, {s}; max.f32 most, most, x;" for s in products[1:]]
    lines += [f"mul.f32 most, most, {scale};"]
    lines += [f"setp.gt.f32 {name}, most, {_hex(end)};" for name, end in (("middle", NEAR), ("far", FAR))]
    # Factors of s, s^3 and s^5 instead of x's: the softcap times powers of the scale.
    lines += [f"mul.f32 x, {scale}, {scale};", f"mul.f32 l0, {scale}, {softcap};", "mul.f32 l1, l0, x;"]
    lines += ["mul.f32 l2, l1, x;"]
    lines += [f"mul.f32 s{n}, l{n}, {_hex(factor)};" for n, factor in enumerate(SHORT)]
    lines += [f"mul.f32 l{n}, l{n}, {_hex(factor)};" for n, factor in enumerate(LONG)]
    lines += ["@far bra FAR;", "@middle bra MIDDLE;"]
    for n, s in enumerate(products):
        lines.append(f"mul.f32 x, {s}, {s}; fma.rn.f32 y, x, s1, s0; mul.f32 ${n}, y, {s};")
    lines += ["bra DONE;", "MIDDLE:"]
    for n, s in enumerate(products):
        lines.append(f"mul.f32 x, {s}, {s}; fma.rn.f32 y, x, l2, l1; fma.rn.f32 y, y, x, l0; mul.f32 ${n}, y, {s};")
    lines += ["bra DONE;", "FAR:"]
    for n, s in enumerate(products):
        lines.append(f"mul.f32 x, {s}, {scale}; tanh.approx.f32 x, x; mul.f32 ${n}, x, {softcap};")
    return "{ " + " ".join(lines) + " DONE: }"


def _hex(number: float) -> str:
    """A constant of 32 bits as the assembler reads it."""
    return "0f" + struct.pack(">f", number).hex().upper()


ASSEMBLY = gl.constexpr(_assembly())
# Results must not take the place of a product that is still to be read.
PLACES = gl.constexpr(",".join(["=&r"] * TOGETHER + ["r"] * 3 * TOGETHER))
