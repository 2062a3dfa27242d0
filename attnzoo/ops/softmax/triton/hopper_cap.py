"""The softcap of the Hopper forward kernel: c * tanh(s / c), mostly without tanh.

The unit that makes tanh makes exponentials too, and is busy for as long as the tensor cores if each score needs both.
So where all of a thread's scores lie within 0.8 c, which leaves few out, a polynomial takes its place on the
multipliers: s / c * (K0 + K1 (s / c)^2 + K2 (s / c)^4), whose relative error is 3e-4, while that of the unit is 5e-4.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

NEAR = 0.8
K = (0.9996967353417392, -0.3245740176520229, 0.09357506488487746)  # least relative error up to NEAR


@gluon.jit
def capped(s, scale, softcap, TOGETHER: gl.constexpr):
    """Scores of products `s`: `scale` is over the softcap, and the `softcap` in the units that scores come in.

    One branch decides on TOGETHER scores of a thread, 32 or 64.
    """
    if TOGETHER == 64:
        return gl.inline_asm_elementwise(BY_64, PLACES_64, [s, scale, softcap], gl.float32, True, 64)
    return gl.inline_asm_elementwise(BY_32, PLACES_32, [s, scale, softcap], gl.float32, True, 32)


def _assembly(count: int) -> str:
    """For so many products, in the operands that follow as many results, then the scale and the softcap."""
    products = [f"${count + n}" for n in range(count)]
    scale, softcap = f"${2 * count}", f"${3 * count}"
    lines = [".reg .pred far;", ".reg .f32 most, x, y, a, b, c;", f"abs.f32 most, {products[0]};"]
    lines += [f"abs.f32 x, {s}; max.f32 most, most, x;" for s in products[1:]]
    lines += [f"mul.f32 most, most, {scale};", f"setp.gt.f32 far, most, {_hex(NEAR)};"]
    lines += [
        f"mul.f32 a, {scale}, {softcap};",
        f"mul.f32 x, {scale}, {scale};",
        "mul.f32 b, a, x;",
        "mul.f32 c, b, x;",
    ]
    lines += [f"mul.f32 {name}, {name}, {_hex(factor)};" for name, factor in zip("abc", K, strict=True)]
    lines.append("@far bra FAR;")
    for n, s in enumerate(products):
        lines.append(f"mul.f32 x, {s}, {s}; fma.rn.f32 y, x, c, b; fma.rn.f32 y, y, x, a; mul.f32 ${n}, y, {s};")
    lines += ["bra DONE;", "FAR:"]
    for n, s in enumerate(products):
        lines.append(f"mul.f32 x, {s}, {scale}; tanh.approx.f32 x, x; mul.f32 ${n}, x, {softcap};")
    return "{ " + " ".join(lines) + " DONE: }"


def _hex(number: float) -> str:
    """A constant of 32 bits as the assembler reads it."""
    return "0f" + struct.pack(">f", number).hex().upper()


def _places(count: int) -> str:
    """The kinds of these operands; results must not take the place of a product that is still to be read."""
    return ",".join(["=&r"] * count + ["r"] * 3 * count)


BY_32 = gl.constexpr(_assembly(32))
BY_64 = gl.constexpr(_assembly(64))
PLACES_32 = gl.constexpr(_places(32))
PLACES_64 = gl.constexpr(_places(64))
