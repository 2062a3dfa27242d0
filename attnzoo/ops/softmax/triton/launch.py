"""Launches of the kernels: grids, pointers and strides. Nothing here reads a value from the device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnzoo.masks import Causal, Dilated, Full, SlidingWindow
from attnzoo.ops.launcher import Recording, launcher_of
from attnzoo.ops.launching import interpreted
from attnzoo.ops.softmax.triton import config, handed, hopper_launch
from attnzoo.ops.softmax.triton.bias import bias_gradient_kernel
from attnzoo.ops.softmax.triton.config import Tiles
from attnzoo.ops.softmax.triton.documents import clear_tail_kernel
from attnzoo.ops.softmax.triton.forward import forward_kernel
from attnzoo.ops.softmax.triton.handed import empty_as
from attnzoo.ops.softmax.triton.key_gradient import key_gradient_kernel
from attnzoo.ops.softmax.triton.query_gradient import query_gradient_kernel
from attnzoo.ops.softmax.triton.shapes import (
    Arguments,
    pattern_of,
    precision,
    size_of,
    walk_of,
)


def forward(x: Arguments, tiles: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """Output `[B, Hq, Sq, Dv]`, laid out in memory as q is, and logsumexp `[B, Hq, Sq]` in fp32."""
    out = empty_as(x.q, x.v.shape[-1])
    lse = torch.empty(x.q.shape[:3], dtype=torch.float32, device=x.q.device)
    tensors = (x.q, x.k, x.v, out, lse, x.sinks, x.cu_q, x.cu_k)
    key = None if tiles is not None else _key(x)
    if key is not None:
        known = _RECORDED.get(key)
        if known is not None and known.replay(tensors):
            return out, lse
    with _recorded(key, tensors) as recording:
        _forward(x, out, lse, tiles, recording)
    return out, lse


def _forward(x: Arguments, out: Tensor, lse: Tensor, tiles: Tiles | None, recording: Recording | None) -> None:
    if x.cu_q is not None:  # rows past the last document belong to no program
        clear_tail(out, x.cu_q, recording=recording)
        clear_tail(lse, x.cu_q, -math.inf, recording)
    if out.numel() == 0:
        return
    x = handed.with_plain_rows(x)
    pattern = pattern_of(x)
    if tiles is None and hopper_launch.takes(x, pattern):
        return hopper_launch.forward(x, pattern, out, lse, recording)
    tiles = tiles or config.forward_tiles(size_of(x, pattern, handed.capability(x)))
    each = handed.tiles_each(x, pattern, x.q.shape[2], tiles.m)
    plain = x.softcap is None and x.bias is None and x.slopes is None and x.scale > 0
    # e^60 and e^-60, and sums of millions of them, are far from what fp32 and bf16 can hold.
    bounded = x.softcap is not None and x.softcap <= 60 and x.q.dtype != torch.float16
    bounded = bounded and x.bias is None and x.slopes is None
    constants = handed.constants(x, pattern, tiles)
    copied = handed.copied_keys(x, tiles, pattern, constants)
    arguments = (
        *(x.q, x.k, x.v, out, lse, x.sinks),
        *handed.options(x),
        *copied,
        pattern.tables,
        *walk_of(x, pattern, tiles, by_keys=False),
        *(stride for t in (x.q, x.k, x.v, out) for stride in t.stride()[:3]),
        *handed.option_strides(x),
        *handed.numbers(x, pattern, each),
    )
    constants |= {"PLAIN": plain, "BOUNDED": bounded, "ENDS": handed.ends(x, pattern, copied)}
    _launch(forward_kernel, each * x.q.shape[0] * x.q.shape[1], arguments, constants, tiles, recording)


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
        delta.zero_()
        lse2.fill_(math.inf)
    written = (out, d_out, lse, d_lse, lse2, delta, d_q, d_k, d_v)
    tensors = (x.q, x.k, x.v, *written, x.cu_q, x.cu_k)
    key = _key(x, out, d_out, d_lse)
    known = None if key is None else _RECORDED.get(key)
    if known is None or not known.replay(tensors):
        with _recorded(key, tensors) as recording:
            _backward(x, *written, recording)
    rows = rows if x.cu_q is not None else lse.shape[2]
    return d_q, d_k, d_v, lse2[..., :rows], delta[..., :rows]


def _backward(
    x: Arguments,
    out: Tensor,
    d_out: Tensor,
    lse: Tensor,
    d_lse: Tensor | None,
    lse2: Tensor,
    delta: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    recording: Recording | None,
) -> None:
    if x.cu_q is not None:
        assert x.cu_k is not None
        for t, boundaries in ((d_q, x.cu_q), (d_k, x.cu_k), (d_v, x.cu_k)):
            clear_tail(t, boundaries, recording=recording)
    if d_q.numel() == 0 or d_k.numel() == 0:
        for t in (d_q, d_k, d_v, delta):
            t.zero_()
        lse2.fill_(math.inf)
        return
    x = handed.with_plain_rows(x)
    d_out = handed.plain_rows(d_out)
    pattern = pattern_of(x)
    if hopper_launch.takes_gradients(x, pattern, d_out):
        hopper_launch.queries(x, pattern, out, d_out, lse, d_lse, lse2, delta, d_q, recording)
        return hopper_launch.keys(x, pattern, d_out, lse2, delta, d_k, d_v, recording)
    size = size_of(x, pattern, handed.capability(x))
    tiles, key_tiles = config.query_gradient_tiles(size), config.key_gradient_tiles(size)
    constants, key_constants = handed.constants(x, pattern, tiles), handed.constants(x, pattern, key_tiles)
    rows = lse2.stride(1)
    copied = handed.copied_keys(x, tiles, pattern, constants)
    copied_queries = (
        handed.descriptor(x.q, key_tiles.m, constants["BLOCK_D"], pattern),
        handed.descriptor(d_out, key_tiles.m, constants["BLOCK_DV"], pattern),
        handed.row_descriptor(lse2, key_tiles.m, pattern),
        handed.row_descriptor(delta, key_tiles.m, pattern),
    )
    ends = handed.ends(x, pattern, (*copied, *copied_queries))
    each = handed.tiles_each(x, pattern, x.q.shape[2], tiles.m)
    arguments: tuple[Any, ...] = (
        *(x.q, x.k, x.v, out, d_out, lse, d_lse, lse2, delta, d_q),
        *handed.options(x),
        *copied,
        pattern.tables,
        *walk_of(x, pattern, tiles, by_keys=False),
        *(stride for t in (x.q, x.k, x.v, out, d_out, d_q) for stride in t.stride()[:3]),
        rows,
        *handed.option_strides(x),
        *handed.numbers(x, pattern, each),
    )
    constants["ENDS"] = ends
    _launch(query_gradient_kernel, each * x.q.shape[0] * x.q.shape[1], arguments, constants, tiles, recording)
    each = handed.tiles_each(x, pattern, x.k.shape[2], key_tiles.n)
    arguments = (
        *(x.q, x.k, x.v, d_out, lse2, delta, d_k, d_v),
        *handed.options(x),
        *copied_queries,
        pattern.tables,
        *walk_of(x, pattern, key_tiles, by_keys=True),
        *(stride for t in (x.q, x.k, x.v, d_out, d_k, d_v) for stride in t.stride()[:3]),
        rows,
        *handed.option_strides(x),
        *handed.numbers(x, pattern, each),
    )
    key_constants |= {"ENDS": ends, "PARTIAL_STAGES": 1}  # registers are short there
    _launch(key_gradient_kernel, each * x.k.shape[0] * x.k.shape[1], arguments, key_constants, key_tiles, recording)


def bias_gradient(d_out: Tensor, lse: Tensor, delta: Tensor, x: Arguments, shape: torch.Size) -> Tensor:
    """The gradient of the bias in its own shape, `[1|B, 1|Hq, 1|Sq, 1|Sk]` or what broadcasts to it, in its dtype.

    Where the bias has one row or one column for all, its gradient is made for each and then summed.
    """
    assert x.bias is not None
    dtype = x.bias.dtype
    x = handed.with_plain_rows(x)
    d_out = handed.plain_rows(d_out)
    own = (1,) * (4 - len(shape)) + tuple(shape)
    d_bias = torch.empty(*own[:2], x.q.shape[2], x.k.shape[2], dtype=torch.float32, device=x.q.device)
    if d_bias.numel() == 0 or x.q.shape[0] == 0:
        return d_bias.zero_().sum_to_size(own).reshape(shape).to(dtype)
    pattern = pattern_of(x, split=False)
    tiles = config.bias_gradient_tiles(size_of(x, pattern, handed.capability(x)))
    constants = handed.constants(x, pattern, tiles)
    grid = own[0] * own[1] * -(-x.q.shape[2] // tiles.m) * -(-x.k.shape[2] // tiles.n)
    arguments = (
        *(x.q, x.k, x.v, d_out, lse, delta, d_bias),
        *(x.slopes, x.bias, x.dense, x.key_lengths, pattern.tables, x.seed),
        *(stride for t in (x.q, x.k, x.v, d_out) for stride in t.stride()[:3]),
        delta.stride(1),
        *handed.option_strides(x),
        *(x.q.shape[0], x.q.shape[1], own[0], own[1], x.q.shape[2], x.k.shape[2], pattern.window, pattern.ahead),
        *(x.scale, x.softcap, x.dropout_p),
    )
    _launch(bias_gradient_kernel, grid, arguments, constants, tiles)
    return d_bias.sum_to_size(own).reshape(shape).to(dtype)


def _launch(
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    tiles: Tiles,
    recording: Recording | None = None,
) -> None:
    launcher, options = launcher_of(kernel), {"num_warps": tiles.warps, "num_stages": tiles.stages}
    if recording is None:
        launcher((programs,), arguments, constants, **options)
    else:
        launcher.recorded(recording, (programs,), arguments, constants, **options)


_RECORDED: dict[tuple[Any, ...], Recording] = {}


def _key(x: Arguments, *others: Tensor | None) -> tuple[Any, ...] | None:
    """What the launches of a call depend on, with q, k, v, sinks, boundaries and the `others` as its only tensors; None
    for calls with more of them, or off the current GPU."""
    if x.q.device.type != "cuda" or x.q.device.index != torch.cuda.current_device() or interpreted():
        return None
    options = (x.bias, x.slopes, x.dense, x.key_lengths, x.seed)
    if any(t is not None for t in options) or not isinstance(x.mask, Full | Causal | SlidingWindow | Dilated):
        return None
    tensors = (x.q, x.k, x.v, x.sinks, x.cu_q, x.cu_k, *others)
    kinds = [None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors]
    numbers = (x.mask.text, x.scale, x.softcap, x.dropout_p, precision(x.q.dtype), x.q.device.index)
    same = x.cu_q is not None and x.cu_k is not None and x.cu_q.data_ptr() == x.cu_k.data_ptr()
    return (*kinds, *numbers, same, len(others))


@contextmanager
def _recorded(key: tuple[Any, ...] | None, tensors: tuple[Tensor | None, ...]) -> Iterator[Recording | None]:
    """What takes down the launches inside, and keeps them under the key once all were made."""
    recording = None if key is None else Recording(tensors)
    yield recording
    if key is not None and recording is not None:
        if len(_RECORDED) >= 1024:  # lengths that never come back would fill the memory
            _RECORDED.clear()
        _RECORDED[key] = recording


def clear_tail(t: Tensor, boundaries: Tensor, value: float = 0.0, recording: Recording | None = None) -> None:
    """Write `value` into `[1, H, S, D]` or `[1, H, S]` past the last document; writing it everywhere before a call
    would take a few percent of the whole."""
    heads, length = t.shape[1:3]
    dim, rows = (t.shape[3], 64) if t.dim() == 4 else (1, 1024)
    if t.numel() > 0:
        grid = (-(-length // rows), heads)
        arguments = (t, boundaries, boundaries.shape[0] - 1, length, t.stride(1), t.stride(2))
        known = {"DIM": dim, "ROWS": rows, "COLUMNS": 1 << (dim - 1).bit_length(), "VALUE": value}
        if recording is None:
            launcher_of(clear_tail_kernel)(grid, arguments, known, num_warps=4)
        else:
            launcher_of(clear_tail_kernel).recorded(recording, grid, arguments, known, num_warps=4)
