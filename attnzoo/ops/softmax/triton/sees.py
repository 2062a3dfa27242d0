"""Which query sees which key, inside a kernel: every pattern of `attnzoo.masks` in a tile's own arithmetic.

`patterns.py` describes the program and the tables. A program is compiled in: only the patterns that it names cost
anything, and of a mask's programs by head a kernel runs one.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def sees(PROGRAM: tl.constexpr, tables, head, i, j):
    """Whether the queries at positions i see the keys at positions j, int1 of their broadcast shape.

    Args:
        PROGRAM, tables: of `patterns.lower`.
        head: number of the query head.
        i, j: int32 positions, `[M, 1]` and `[1, N]` or the other way round; below 0 and past the end too.
    """
    if _part(PROGRAM, 0) == "per_head":
        at = tables + tl.load(tables) + 2 * head
        seen = _one_of(_part(PROGRAM, 1), tl.load(at), tables, tl.load(at + 1), i, j)
    else:
        seen = _run(PROGRAM, tables, 0, i, j)
    return seen


@triton.jit
def _one_of(PROGRAMS: tl.constexpr, number, tables, base, i, j):
    if _count(PROGRAMS) == 1:
        seen = _run(_part(PROGRAMS, 0), tables, base, i, j)
    else:
        if number == 0:
            seen = _run(_part(PROGRAMS, 0), tables, base, i, j)
        else:
            seen = _one_of(_rest(PROGRAMS), number - 1, tables, base, i, j)
    return seen


@triton.jit
def _run(PROGRAM: tl.constexpr, tables, base, i, j):
    NAME: tl.constexpr = _part(PROGRAM, 0)
    if NAME == "and":
        seen = _run(_part(PROGRAM, 1), tables, base, i, j) & _run(_part(PROGRAM, 2), tables, base, i, j)
    elif NAME == "or":
        seen = _run(_part(PROGRAM, 1), tables, base, i, j) | _run(_part(PROGRAM, 2), tables, base, i, j)
    elif NAME == "blockwise":
        BLOCK: tl.constexpr = _part(PROGRAM, 1)
        seen = _run(_part(PROGRAM, 2), tables, base, _block_of(i, BLOCK), _block_of(j, BLOCK))
    elif NAME == "full":
        seen = _full(i, j)
    elif NAME == "causal":
        seen = _causal(i, j)
    elif NAME == "sliding_window":
        seen = _sliding_window(i, j, _part(PROGRAM, 1), _part(PROGRAM, 2))
    elif NAME == "dilated":
        seen = _dilated(i, j, _part(PROGRAM, 1), _part(PROGRAM, 2), _part(PROGRAM, 3))
    elif NAME == "documents":
        seen = _documents(i, j, tables, base + _part(PROGRAM, 1))
    elif NAME == "global_tokens":
        seen = _global_tokens(i, j, tables, base + _part(PROGRAM, 1))
    else:
        tl.static_assert(NAME == "random_blocks")
        seen = _random_blocks(i, j, tables, base + _part(PROGRAM, 1), _part(PROGRAM, 2), _part(PROGRAM, 3))
    return seen


@triton.jit
def _full(i, j):
    return i + j == i + j


@triton.jit
def _causal(i, j):
    return j <= i


@triton.jit
def _sliding_window(i, j, WINDOW: tl.constexpr, AHEAD: tl.constexpr):
    return (j - i <= AHEAD) & (i - j < WINDOW)


@triton.jit
def _dilated(i, j, FIRST: tl.constexpr, END: tl.constexpr, DILATION: tl.constexpr):
    distance = i - j
    return (distance >= FIRST) & (distance < END) & (distance % DILATION == 0)


@triton.jit
def _documents(i, j, tables, slot):
    query = _look_up(tables, slot, i)
    return (query == _look_up(tables, slot, j)) & (query >= 0)


@triton.jit
def _global_tokens(i, j, tables, slot):
    return (_look_up(tables, slot, i) > 0) | (_look_up(tables, slot, j) > 0)


@triton.jit
def _random_blocks(i, j, tables, slot, BLOCK: tl.constexpr, PER_ROW: tl.constexpr):
    row = _block_of(i, BLOCK)
    key = _block_of(j, BLOCK)
    seen = i + j != i + j
    for stretch in tl.static_range(PER_ROW):
        seen = seen | (_look_up(tables, slot, row * PER_ROW + stretch) == key)
    return seen


@triton.jit
def _block_of(position, BLOCK: tl.constexpr):
    """position // BLOCK, rounded down below 0 too, where Triton's division rounds up."""
    return tl.where(position >= 0, position // BLOCK, -((-1 - position) // BLOCK) - 1)


@triton.jit
def _look_up(tables, slot, place):
    start = tl.load(tables + 2 * slot)
    length = tl.load(tables + 2 * slot + 1)
    return tl.load(tables + start + place, mask=(place >= 0) & (place < length), other=-1)


# Tuples within tuples reach a jit function whole only through functions like these.


@triton.constexpr_function
def _part(program: tuple[Any, ...], number: int) -> Any:
    return program[number]


@triton.constexpr_function
def _rest(programs: tuple[Any, ...]) -> tuple[Any, ...]:
    return programs[1:]


@triton.constexpr_function
def _count(programs: tuple[Any, ...]) -> int:
    return len(programs)
