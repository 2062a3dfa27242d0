"""Tiles of the linear kernels: where a program's tokens are, and loads and stores of these.

A sequence (a row, or a packed document) is cut into parts of `part` tokens, one a program, and a part into chunks.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import NamedTuple

import triton
import triton.language as tl


class Where(NamedTuple):
    """Where a program's tokens are: a part of a sequence."""

    n: tl.tensor  # the sequence
    row: tl.tensor  # of the batch
    begin: tl.tensor  # the sequence's first token
    end: tl.tensor  # one past its last real token
    stop: tl.tensor  # one past its last token
    place: tl.tensor  # of the part in the sequence; below 0 there is nothing to do
    count: tl.tensor  # parts of the sequence
    start: tl.tensor  # the part's first token


@triton.jit
def locate(lengths, cu_seqlens, table, length, parts, part):
    """Where this program's tokens are."""
    p = tl.program_id(0)
    if cu_seqlens is not None:
        n = tl.load(table + 2 * p).to(tl.int32)
        place = tl.load(table + 2 * p + 1).to(tl.int32)
        row = n * 0
        begin = tl.load(cu_seqlens + n).to(tl.int32)
        end = tl.load(cu_seqlens + n + 1).to(tl.int32)
        stop = end
        count = tl.maximum((end - begin + part - 1) // part, 1)
    else:
        n = p // parts
        place = p % parts
        row = n
        begin = n * 0
        stop = begin + length
        end = stop
        if lengths is not None:
            end = tl.load(lengths + n).to(tl.int32)
        count = begin + parts
    return Where(n, row, begin, end, stop, place, count, begin + place * part)


@triton.jit
def load_rate(log_decay, head):
    """The natural log of a head's decay, None where nothing decays."""
    rate = None
    if log_decay is not None:
        rate = tl.load(log_decay + head).to(tl.float32)
    return rate


@triton.jit
def head_base(x, row, head, stride_b, stride_h):
    """The first token of one head."""
    return x + row.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def row_mask(first, low, high, ROWS: tl.constexpr):
    """Which of the rows from `first` on are in [low, high)."""
    rows = first + tl.arange(0, ROWS)
    return (rows >= low) & (rows < high)


@triton.jit
def tile_pointers(base, stride, first, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """[ROWS, BLOCK] pointers from row `first` on, whose offset may be past 2^31."""
    start = base + tl.cast(first, tl.int64) * stride
    return start + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, BLOCK)[None, :]


@triton.jit
def tile_mask(first, low, high, width, ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr):
    """[ROWS, BLOCK], or one that broadcasts to it: rows in [low, high) unless FULL, columns in `width` unless EVEN."""
    columns = (tl.arange(0, BLOCK) < width)[None, :]
    if FULL:
        mask = columns
    elif EVEN:
        mask = row_mask(first, low, high, ROWS)[:, None]
    else:
        mask = row_mask(first, low, high, ROWS)[:, None] & columns
    return mask


@triton.jit
def load_tile(
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
):
    """[ROWS, BLOCK], 0 outside the rows [low, high) unless FULL, and beyond `width` columns unless EVEN."""
    pointers = tile_pointers(base, stride, first, ROWS, BLOCK)
    if FULL and EVEN:  # without masks there are fewer registers to spill: worth up to a quarter of the time
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=tile_mask(first, low, high, width, ROWS, BLOCK, EVEN, FULL), other=0.0)
    return x


@triton.jit
def store_tile(
    base,
    stride,
    first,
    low,
    high,
    width,
    x,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    FULL: tl.constexpr,
):
    """Write a tile's rows in [low, high), all if FULL, and its first `width` columns, all if EVEN."""
    pointers = tile_pointers(base, stride, first, ROWS, BLOCK)
    x = x.to(base.dtype.element_ty)
    if FULL and EVEN:
        tl.store(pointers, x)
    else:
        tl.store(pointers, x, mask=tile_mask(first, low, high, width, ROWS, BLOCK, EVEN, FULL))


@triton.jit
def load_tokens(x, first, low, high, CHUNK: tl.constexpr, FULL: tl.constexpr):
    """One number a token, [CHUNK], 0 outside the rows [low, high)."""
    if FULL:
        found = tl.load(x + first + tl.arange(0, CHUNK))
    else:
        found = tl.load(x + first + tl.arange(0, CHUNK), mask=row_mask(first, low, high, CHUNK), other=0.0)
    return found


@triton.jit
def store_tokens(x, first, low, high, values, CHUNK: tl.constexpr, FULL: tl.constexpr):
    """Write one number a token, to the rows in [low, high)."""
    if FULL:
        tl.store(x + first + tl.arange(0, CHUNK), values)
    else:
        tl.store(x + first + tl.arange(0, CHUNK), values, mask=row_mask(first, low, high, CHUNK))
