"""Which query sees which key, inside a kernel: every pattern of `attnzoo.masks` in a tile's own arithmetic.

`patterns.py` describes the program and the tables. A program is compiled in: only the patterns that it names cost
anything, and of a mask's programs by head a kernel runs one.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from attnzoo.ops.softmax.triton.patterns import FAR

_FAR = tl.constexpr(FAR)


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
    if NAME == "stretch":
        seen = _within(_part(PROGRAM, 1), tables, base, i, j)
    elif NAME == "and":
        seen = _run(_part(PROGRAM, 1), tables, base, i, j) & _run(_part(PROGRAM, 2), tables, base, i, j)
    elif NAME == "or":
        seen = _run(_part(PROGRAM, 1), tables, base, i, j) | _run(_part(PROGRAM, 2), tables, base, i, j)
    elif NAME == "blockwise":
        BLOCK: tl.constexpr = _part(PROGRAM, 1)
        seen = _run(_part(PROGRAM, 2), tables, base, _block_of(i, BLOCK), _block_of(j, BLOCK))
    elif NAME == "every":
        seen = _every(i, j, _part(PROGRAM, 1))
    elif NAME == "first_tokens":
        seen = _first_tokens(i, j, tables, base + _part(PROGRAM, 1))
    elif NAME == "global_tokens":
        seen = _global_tokens(i, j, tables, base + _part(PROGRAM, 1))
    else:
        tl.static_assert(NAME == "random_blocks")
        seen = _random_blocks(i, j, tables, base + _part(PROGRAM, 1), _part(PROGRAM, 2), _part(PROGRAM, 3))
    return seen


@triton.jit
def _every(i, j, DILATION: tl.constexpr):
    return _rest_of(i, DILATION) == _rest_of(j, DILATION)


@triton.jit
def _first_tokens(i, j, tables, slot):
    number = tl.load(tables + tl.load(tables + 2 * slot))
    return ((i >= 0) & (i < number)) | ((j >= 0) & (j < number))


@triton.jit
def _global_tokens(i, j, tables, slot):
    return (_look_up(tables, slot, i, 0) > 0) | (_look_up(tables, slot, j, 0) > 0)


@triton.jit
def _random_blocks(i, j, tables, slot, BLOCK: tl.constexpr, PER_ROW: tl.constexpr):
    row = _block_of(i, BLOCK)
    key = _block_of(j, BLOCK)
    seen = i + j != i + j
    for stretch in tl.static_range(PER_ROW):
        seen = seen | (_look_up(tables, slot, row * PER_ROW + stretch, -1) == key)
    return seen


@triton.jit
def _within(PROGRAM: tl.constexpr, tables, base, i, j):
    """Ends are found for the side that comes first, the one that a kernel keeps while it walks along the other."""
    if i.shape[1] == 1:
        first, last = _ends(PROGRAM, tables, base, i, True)
        seen = (j >= first) & (j <= last)
    else:
        first, last = _ends(PROGRAM, tables, base, j, False)
        seen = (i >= first) & (i <= last)
    return seen


@triton.jit
def _ends(PROGRAM: tl.constexpr, tables, base, at, OF_QUERY: tl.constexpr):
    """The first and the last key that the query at a position sees, or else the queries that see the key there."""
    NAME: tl.constexpr = _part(PROGRAM, 0)
    if NAME == "and":
        first, last = _ends(_part(PROGRAM, 1), tables, base, at, OF_QUERY)
        other_first, other_last = _ends(_part(PROGRAM, 2), tables, base, at, OF_QUERY)
        first = tl.maximum(first, other_first)
        last = tl.minimum(last, other_last)
    elif NAME == "blockwise":
        BLOCK: tl.constexpr = _part(PROGRAM, 1)
        first, last = _ends(_part(PROGRAM, 2), tables, base, _block_of(at, BLOCK), OF_QUERY)
        LAST_BLOCK: tl.constexpr = _FAR // BLOCK + 1  # no position lies further
        first = tl.minimum(tl.maximum(first, -LAST_BLOCK), LAST_BLOCK) * BLOCK
        last = tl.minimum(tl.maximum(last, -LAST_BLOCK), LAST_BLOCK) * BLOCK + (BLOCK - 1)
    elif NAME == "documents":
        slot = base + _part(PROGRAM, 1)
        first = _look_up(tables, slot, 2 * at, _FAR)
        last = _look_up(tables, slot, 2 * at + 1, -_FAR)
    elif NAME == "sliding_window":
        BEFORE: tl.constexpr = _part(PROGRAM, 1) - 1
        AFTER: tl.constexpr = _part(PROGRAM, 2)
        first = at - (BEFORE if OF_QUERY else AFTER)
        last = at + (AFTER if OF_QUERY else BEFORE)
    elif NAME == "causal":
        first = tl.full(at.shape, -_FAR, tl.int32) if OF_QUERY else at
        last = at if OF_QUERY else tl.full(at.shape, _FAR, tl.int32)
    else:
        tl.static_assert(NAME == "full")
        first = tl.full(at.shape, -_FAR, tl.int32)
        last = tl.full(at.shape, _FAR, tl.int32)
    return first, last


@triton.jit
def _block_of(position, BLOCK: tl.constexpr):
    """position // BLOCK, rounded down below 0 too, where Triton's division rounds up."""
    return tl.where(position >= 0, position // BLOCK, -((-1 - position) // BLOCK) - 1)


@triton.jit
def _rest_of(position, DILATION: tl.constexpr):
    """What is left of a position after its division by DILATION, at least 0."""
    rest = position % DILATION
    return tl.where(rest < 0, rest + DILATION, rest)


@triton.jit
def _look_up(tables, slot, place, OUTSIDE: tl.constexpr):
    """What stands at a place of a table, or OUTSIDE before its start and past its end."""
    start = tl.load(tables + 2 * slot)
    length = tl.load(tables + 2 * slot + 1)
    return tl.load(tables + start + place, mask=(place >= 0) & (place < length), other=OUTSIDE)


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
