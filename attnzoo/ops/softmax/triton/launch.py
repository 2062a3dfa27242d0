"""Launches of the kernels: grids, pointers and strides. Nothing here reads a value from the device."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from attnzoo.ops.launcher import Launcher
from attnzoo.ops.launching import capability, interpreted
from attnzoo.ops.softmax.triton import config, hopper_launch
from attnzoo.ops.softmax.triton.bias import bias_gradient_kernel
from attnzoo.ops.softmax.triton.config import Tiles
from attnzoo.ops.softmax.triton.documents import clear_tail_kernel
from attnzoo.ops.softmax.triton.forward import forward_kernel
from attnzoo.ops.softmax.triton.key_gradient import key_gradient_kernel
from attnzoo.ops.softmax.triton.query_gradient import query_gradient_kernel
from attnzoo.ops.softmax.triton.shapes import (
    Arguments,
    Pattern,
    ends_of,
    head_blocks,
    least_columns,
    pattern_of,
    precision,
    size_of,
    walk_of,
)


def forward(x: Arguments, tiles: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """Output `[B, Hq, Sq, Dv]`, laid out in memory as q is, and logsumexp `[B, Hq, Sq]` in fp32."""
    out = empty_as(x.q, x.v.shape[-1])
    lse = torch.empty(x.q.shape[:3], dtype=torch.float32, device=x.q.device)
    if x.cu_q is not None:  # rows past the last document belong to no program
        _clear_tail(out, x.cu_q)
        lse.fill_(-math.inf)
    if out.numel() == 0:
        return out, lse
    x = _with_plain_rows(x)
    pattern = pattern_of(x)
    if tiles is None and hopper_launch.takes(x, pattern):
        hopper_launch.forward(x, pattern, out, lse)
        return out, lse
    tiles = tiles or config.forward_tiles(size_of(x, pattern, _capability(x)))
    each = _tiles_each(x, pattern, x.q.shape[2], tiles.m)
    plain = x.softcap is None and x.bias is None and x.slopes is None and x.scale > 0
    # e^60 and e^-60, and sums of millions of them, are far from what fp32 and bf16 can hold.
    bounded = x.softcap is not None and x.softcap <= 60 and x.q.dtype != torch.float16
    bounded = bounded and x.bias is None and x.slopes is None
    constants = _constants(x, pattern, tiles)
    copied = _copied_keys(x, tiles, pattern, constants)
    arguments = (
        *(x.q, x.k, x.v, out, lse, x.sinks),
        *_options(x),
        *copied,
        pattern.tables,
        *walk_of(x, pattern, tiles, by_keys=False),
        *(stride for t in (x.q, x.k, x.v, out) for stride in t.stride()[:3]),
        *_option_strides(x),
        *_numbers(x, pattern, each),
    )
    constants |= {"PLAIN": plain, "BOUNDED": bounded, "ENDS": _ends(x, pattern, copied)}
    _launch(forward_kernel, each * x.q.shape[0] * x.q.shape[1], arguments, constants, tiles)
    return out, lse


def backward(
    d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, x: Arguments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, laid out as these are; and what those of sinks and bias are made of, a number a row:
    the logsumexp times log2(e), +inf where a query sees no key, and delta. Rows are those of q, or, where documents are
    packed, have gaps between."""
    d_q, d_k, d_v = empty_as(x.q), empty_as(x.k), empty_as(x.v)
    rows = lse.shape[2] if x.cu_q is None else lse.shape[2] + 4 * x.cu_q.shape[0]  # see `statistics_start`
    rows = -(-rows // 128) * 128  # padded, so that the copy engine takes them
    lse2, delta = (lse.new_empty(*lse.shape[:2], rows) for _ in range(2))  # rows of d_out times out, less d_lse
    if x.cu_q is not None:
        for t, boundaries in ((d_q, x.cu_q), (d_k, x.cu_k), (d_v, x.cu_k)):
            _clear_tail(t, boundaries)
        delta.zero_()
        lse2.fill_(math.inf)
    if d_q.numel() == 0 or d_k.numel() == 0:
        return d_q.zero_(), d_k.zero_(), d_v.zero_(), torch.full_like(lse, math.inf), torch.zeros_like(lse)
    x = _with_plain_rows(x)
    d_out = _plain_rows(d_out)
    pattern = pattern_of(x)
    size = size_of(x, pattern, _capability(x))
    tiles, key_tiles = config.query_gradient_tiles(size), config.key_gradient_tiles(size)
    constants, key_constants = _constants(x, pattern, tiles), _constants(x, pattern, key_tiles)
    copied = _copied_keys(x, tiles, pattern, constants)
    copied_queries = (
        _descriptor(x.q, key_tiles.m, constants["BLOCK_D"], pattern),
        _descriptor(d_out, key_tiles.m, constants["BLOCK_DV"], pattern),
        _row_descriptor(lse2, key_tiles.m, pattern),
        _row_descriptor(delta, key_tiles.m, pattern),
    )
    ends = _ends(x, pattern, (*copied, *copied_queries))
    each = _tiles_each(x, pattern, x.q.shape[2], tiles.m)
    arguments: tuple[Any, ...] = (
        *(x.q, x.k, x.v, out, d_out, lse, d_lse, lse2, delta, d_q),
        *_options(x),
        *copied,
        pattern.tables,
        *walk_of(x, pattern, tiles, by_keys=False),
        *(stride for t in (x.q, x.k, x.v, out, d_out, d_q) for stride in t.stride()[:3]),
        rows,
        *_option_strides(x),
        *_numbers(x, pattern, each),
    )
    constants["ENDS"] = ends
    _launch(query_gradient_kernel, each * x.q.shape[0] * x.q.shape[1], arguments, constants, tiles)
    each = _tiles_each(x, pattern, x.k.shape[2], key_tiles.n)
    arguments = (
        *(x.q, x.k, x.v, d_out, lse2, delta, d_k, d_v),
        *_options(x),
        *copied_queries,
        pattern.tables,
        *walk_of(x, pattern, key_tiles, by_keys=True),
        *(stride for t in (x.q, x.k, x.v, d_out, d_k, d_v) for stride in t.stride()[:3]),
        rows,
        *_option_strides(x),
        *_numbers(x, pattern, each),
    )
    key_constants |= {"ENDS": ends, "PARTIAL_STAGES": 1}  # registers are short there
    _launch(key_gradient_kernel, each * x.k.shape[0] * x.k.shape[1], arguments, key_constants, key_tiles)
    rows = rows if x.cu_q is not None else lse.shape[2]
    return d_q, d_k, d_v, lse2[..., :rows], delta[..., :rows]


def bias_gradient(d_out: Tensor, lse: Tensor, delta: Tensor, x: Arguments, shape: torch.Size) -> Tensor:
    """The gradient of the bias in its own shape, `[1|B, 1|Hq, 1|Sq, 1|Sk]` or what broadcasts to it, in its dtype.

    Where the bias has one row or one column for all, its gradient is made for each and then summed.
    """
    assert x.bias is not None
    dtype = x.bias.dtype
    x = _with_plain_rows(x)
    d_out = _plain_rows(d_out)
    own = (1,) * (4 - len(shape)) + tuple(shape)
    d_bias = torch.empty(*own[:2], x.q.shape[2], x.k.shape[2], dtype=torch.float32, device=x.q.device)
    if d_bias.numel() == 0 or x.q.shape[0] == 0:
        return d_bias.zero_().sum_to_size(own).reshape(shape).to(dtype)
    pattern = pattern_of(x, split=False)
    tiles = config.bias_gradient_tiles(size_of(x, pattern, _capability(x)))
    constants = _constants(x, pattern, tiles)
    grid = own[0] * own[1] * -(-x.q.shape[2] // tiles.m) * -(-x.k.shape[2] // tiles.n)
    arguments = (
        *(x.q, x.k, x.v, d_out, lse, delta, d_bias),
        *(x.slopes, x.bias, x.dense, x.key_lengths, pattern.tables, x.seed),
        *(stride for t in (x.q, x.k, x.v, d_out) for stride in t.stride()[:3]),
        delta.stride(1),
        *_option_strides(x),
        *(x.q.shape[0], x.q.shape[1], own[0], own[1], x.q.shape[2], x.k.shape[2], pattern.window, pattern.ahead),
        *(x.scale, x.softcap, x.dropout_p),
    )
    _launch(bias_gradient_kernel, grid, arguments, constants, tiles)
    return d_bias.sum_to_size(own).reshape(shape).to(dtype)


@lru_cache(maxsize=8)
def _launcher(kernel: Any) -> Launcher:
    return Launcher(kernel)


def _launch(kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any], tiles: Tiles) -> None:
    _launcher(kernel)((programs,), arguments, constants, num_warps=tiles.warps, num_stages=tiles.stages)


def empty_as(t: Tensor, dim: int | None = None) -> Tensor:
    """An uninitialised `[B, H, S, dim]` whose heads lie inside or outside its rows as those of `t` do."""
    batch, heads, length, own = t.shape
    dim = own if dim is None else dim
    if t.stride(1) < t.stride(2):
        return t.new_empty(batch, length, heads, dim).transpose(1, 2)
    return t.new_empty(batch, heads, length, dim)


def _clear_tail(t: Tensor, boundaries: Tensor | None) -> None:
    """Zeros past the last document, in place of which zeros everywhere would take a few percent of the whole."""
    assert boundaries is not None
    _, heads, length, dim = t.shape
    if t.numel() > 0:
        grid = (-(-length // 64), heads)
        arguments = (t, boundaries, boundaries.shape[0] - 1, length, t.stride(1), t.stride(2))
        known = {"DIM": dim, "ROWS": 64, "COLUMNS": 1 << (dim - 1).bit_length()}
        _launcher(clear_tail_kernel)(grid, arguments, known, num_warps=4)


def _plain_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _with_plain_rows(x: Arguments) -> Arguments:
    return x._replace(q=_plain_rows(x.q), k=_plain_rows(x.k), v=_plain_rows(x.v))


def _capability(x: Arguments) -> tuple[int, int]:
    return capability(x.q.device.index) if x.q.device.type == "cuda" else (8, 0)


def _tiles_each(x: Arguments, pattern: Pattern, length: int, block: int) -> int:
    """Programs for each head: an upper bound for documents, whose lengths are only known on the device."""
    if x.cu_q is not None:
        return -(-length // block) + x.cu_q.shape[0] - 1
    rows = -(-length // pattern.step)
    return pattern.step * -(-rows // block)


def _options(x: Arguments) -> tuple[Tensor | None, ...]:
    return (x.slopes, x.bias, x.dense, x.key_lengths, x.cu_q, x.cu_k, x.seed)


def _descriptor(t: Tensor, rows: int, columns: int, pattern: Pattern) -> TensorDescriptor | None:
    """`t` in tiles for the copy engine of Hopper and later; None if it cannot take them."""
    if (
        not (interpreted() or capability(t.device.index) >= (9, 0))
        or pattern.step > 1
        or columns > 256
        or t.numel() == 0
    ):
        return None
    batch, heads, length, dim = t.shape
    size = t.element_size()
    # The stride of a dimension of one is never used, so that it may be any number.
    strides = [n if many > 1 else length * dim for n, many in zip(t.stride()[:3], t.shape[:3], strict=True)]
    if t.data_ptr() % 16 or any(n == 0 or n * size % 16 for n in strides):
        return None
    return TensorDescriptor(t, [batch, heads, length, dim], [*strides, 1], [1, 1, rows, columns])


def _copied_keys(x: Arguments, tiles: Tiles, pattern: Pattern, constants: dict[str, Any]) -> tuple[Any, Any]:
    """Descriptors of k and v."""
    return (
        _descriptor(x.k, tiles.n, constants["BLOCK_D"], pattern),
        _descriptor(x.v, tiles.n, constants["BLOCK_DV"], pattern),
    )


def _ends(x: Arguments, pattern: Pattern, copied: tuple[TensorDescriptor | None, ...]) -> int:
    return 0 if None in copied else ends_of(x, pattern)


def _row_descriptor(t: Tensor, rows: int, pattern: Pattern) -> TensorDescriptor | None:
    """The same for one number a row, `[B, Hq, padded]`."""
    if not (interpreted() or capability(t.device.index) >= (9, 0)) or pattern.step > 1:
        return None
    return TensorDescriptor(t, [t.shape[0] * t.shape[1], t.shape[2]], [t.stride(1), 1], [1, rows])


def _option_strides(x: Arguments) -> tuple[int, ...]:
    bias, dense = ((0, 0, 0, 0) if t is None else t.stride() for t in (x.bias, x.dense))
    slopes = x.slopes.stride(0) if x.slopes is not None and x.slopes.dim() == 2 else 0
    return (*bias, *dense, slopes)


def _numbers(x: Arguments, pattern: Pattern, each: int) -> tuple[Any, ...]:
    documents = 1 if x.cu_q is None else x.cu_q.shape[0] - 1
    lengths = (x.q.shape[1], x.q.shape[2], x.k.shape[2], each, documents, pattern.window, pattern.ahead)
    return (*lengths, x.scale, x.softcap, x.dropout_p)


def _constants(x: Arguments, pattern: Pattern, tiles: Tiles) -> dict[str, Any]:
    dim, v_dim = x.q.shape[-1], x.v.shape[-1]
    least = least_columns(x, _capability(x))
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
