"""What the kernels are handed besides tensors: descriptors, strides, numbers and constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from attnzoo.ops.launching import capability as capability_of
from attnzoo.ops.launching import interpreted, used_strides
from attnzoo.ops.softmax.triton.config import Tiles
from attnzoo.ops.softmax.triton.shapes import (
    Arguments,
    Pattern,
    ends_of,
    head_blocks,
    least_columns,
    precision,
)


def empty_as(t: Tensor, dim: int | None = None) -> Tensor:
    """An uninitialised `[B, H, S, dim]` whose heads lie inside or outside its rows as those of `t` do."""
    batch, heads, length, own = t.shape
    dim = own if dim is None else dim
    if t.stride(1) < t.stride(2):
        return t.new_empty(batch, length, heads, dim).transpose(1, 2)
    return t.new_empty(batch, heads, length, dim)


def plain_rows(t: Tensor) -> Tensor:
    """`t` with numbers of a row side by side; a copy only where they are not."""
    return t if t.stride(-1) == 1 else t.contiguous()


def with_plain_rows(x: Arguments) -> Arguments:
    """The call with plain rows in q, k and v."""
    return x._replace(q=plain_rows(x.q), k=plain_rows(x.k), v=plain_rows(x.v))


def capability(x: Arguments) -> tuple[int, int]:
    """Compute capability of the call's device; that of an A100 under the interpreter."""
    return capability_of(x.q.device.index) if x.q.device.type == "cuda" else (8, 0)


def tiles_each(x: Arguments, pattern: Pattern, length: int, block: int) -> int:
    """Programs for each head: an upper bound for documents, whose lengths are only known on the device."""
    if x.cu_q is not None:
        return -(-length // block) + x.cu_q.shape[0] - 1
    rows = -(-length // pattern.step)
    return pattern.step * -(-rows // block)


def constants(x: Arguments, pattern: Pattern, tiles: Tiles) -> dict[str, Any]:
    """What is compiled into a kernel: sizes, tiles and the mask's shape."""
    dim, v_dim = x.q.shape[-1], x.v.shape[-1]
    least = least_columns(x, capability(x))
    block, extra = head_blocks(dim, least)
    whole, rest = head_blocks(v_dim, least)
    return {
        "GROUP": x.group,
        "D": dim,
        "DV": v_dim,
        "BLOCK_M": tiles.m,
        "BLOCK_N": tiles.n,
        "BLOCK_D": block,
        "BLOCK_E": extra,
        "BLOCK_DV": whole if rest == 0 else 2 * whole,  # values are not split
        "DOCUMENTS": 0 if x.cu_q is None else 1 << (x.cu_q.shape[0] - 2).bit_length(),
        "STEP": pattern.step,
        "LEFT": pattern.left,
        "RIGHT": pattern.right,
        "PROGRAM": pattern.program,
        "PARTIAL_STAGES": 2,
        "PRECISION": precision(x.q.dtype),
        "FAST": x.q.dtype == torch.bfloat16 and not interpreted(),
    }


def options(x: Arguments) -> tuple[Tensor | None, ...]:
    """The optional tensors, in the kernels' order."""
    return (x.slopes, x.bias, x.dense, x.key_lengths, x.cu_q, x.cu_k, x.seed)


def option_strides(x: Arguments) -> tuple[int, ...]:
    """Strides of the bias and of the dense mask, four each, and of the slopes' rows; 0 for what is not there."""
    bias, dense = ((0, 0, 0, 0) if t is None else t.stride() for t in (x.bias, x.dense))
    slopes = x.slopes.stride(0) if x.slopes is not None and x.slopes.dim() == 2 else 0
    return (*bias, *dense, slopes)


def numbers(x: Arguments, pattern: Pattern, each: int) -> tuple[Any, ...]:
    """Lengths, counts and scalars, in the kernels' order; `each` programs a head."""
    documents = 1 if x.cu_q is None else x.cu_q.shape[0] - 1
    lengths = (x.q.shape[1], x.q.shape[2], x.k.shape[2], each, documents, pattern.window, pattern.ahead)
    return (*lengths, x.scale, x.softcap, x.dropout_p)


def copied_keys(x: Arguments, tiles: Tiles, pattern: Pattern, constants: dict[str, Any]) -> tuple[Any, Any]:
    """Descriptors of k and v."""
    return (
        descriptor(x.k, tiles.n, constants["BLOCK_D"], pattern),
        descriptor(x.v, tiles.n, constants["BLOCK_DV"], pattern),
    )


def descriptor(t: Tensor, rows: int, columns: int, pattern: Pattern) -> TensorDescriptor | None:
    """`t` in tiles for the copy engine of Hopper and later; None if it cannot take them."""
    if (
        not (interpreted() or capability_of(t.device.index) >= (9, 0))
        or pattern.step > 1
        or columns > 256
        or t.numel() == 0
    ):
        return None
    strides = used_strides(t)
    if t.data_ptr() % 16 or any(n == 0 or n * t.element_size() % 16 for n in strides):
        return None
    return TensorDescriptor(t, list(t.shape), [*strides, 1], [1, 1, rows, columns])


def row_descriptor(t: Tensor, rows: int, pattern: Pattern) -> TensorDescriptor | None:
    """The same for one number a row, `[B, Hq, padded]`."""
    if not (interpreted() or capability_of(t.device.index) >= (9, 0)) or pattern.step > 1:
        return None
    return TensorDescriptor(t, [t.shape[0] * t.shape[1], t.shape[2]], [t.stride(1), 1], [1, rows])


def ends(x: Arguments, pattern: Pattern, copied: tuple[TensorDescriptor | None, ...]) -> int:
    """How partial tiles are read: 0 by pointers, where some tensor cannot be copied; else as `ends_of` says."""
    return 0 if None in copied else ends_of(x, pattern)
