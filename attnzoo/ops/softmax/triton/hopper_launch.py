"""Launches of the Hopper kernel: which calls it takes, and how it cuts them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from attnzoo.ops.launcher import Recording, launcher_of
from attnzoo.ops.launching import can_copy, capability, interpreted, num_multiprocessors, used_strides
from attnzoo.ops.softmax.triton.documents import document_tiles_kernel
from attnzoo.ops.softmax.triton.hopper import hopper_forward_kernel
from attnzoo.ops.softmax.triton.hopper_keys import hopper_keys_kernel
from attnzoo.ops.softmax.triton.hopper_queries import hopper_queries_kernel
from attnzoo.ops.softmax.triton.shapes import Arguments, Pattern, ends_of, reach_of

LEAST_QUERIES = 128  # fewer leave most of a program's rows empty
LEAST_REACH = 4096  # keys that a query sees, from which on the gradients, and heads of 64, are faster than elsewhere
CACHE = 64 << 20  # bytes of keys and values that programs side by side may read: the L2 cache and a little more


class Cut(NamedTuple):
    """How the kernel cuts its work: keys in a tile, tiles in flight, and groups of 64 queries."""

    keys: int
    stages: int
    groups: int
    turns: bool  # one group's exponentials under another's products


def takes(x: Arguments, pattern: Pattern) -> bool:
    """Whether the kernel computes this call: full, causal and window masks, packed or not, with sinks or a softcap, in
    half precision and for heads up to 128 wide."""
    if x.q.device.type != "cuda" or interpreted() or capability(x.q.device.index)[0] != 9:
        return False
    extras = (x.bias, x.slopes, x.dense, x.key_lengths, x.seed, pattern.program)
    if any(extra is not None for extra in extras) or pattern.step > 1 or x.scale <= 0:
        return False
    dim, v_dim, q_len = x.q.shape[-1], x.v.shape[-1], x.q.shape[2]
    if x.q.element_size() != 2 or max(dim, v_dim) > 128 or (dim <= 64) != (v_dim <= 64):
        return False
    if x.softcap is not None and (x.softcap > 60 or x.q.dtype != torch.bfloat16):
        return False
    # Tiles are read whole: no key in them may be one that nobody sees, which could be NaN.
    if (pattern.left or pattern.right) and not ends_of(x, pattern):
        return False
    if x.k.shape[2] == 0 or q_len < LEAST_QUERIES or (dim <= 64 and reach_of(x, pattern) < LEAST_REACH):
        return False
    return all(can_copy(t) for t in (x.q, x.k, x.v))


def cut_of(block: int) -> Cut:
    """By the columns of a tile."""
    return Cut(128, 3, 3, True) if block == 64 else Cut(128, 2, 2, False)


def section_of(x: Arguments, pattern: Pattern) -> int:
    """How many heads are worked on side by side. Under a causal mask as many as fit into the cache: the more there are,
    the more evenly long and short pieces spread over the programs."""
    if pattern.left or not pattern.right:
        return x.group
    batch, heads, length = x.k.shape[:3]
    each = length * (x.k.shape[3] + x.v.shape[3]) * x.k.element_size()
    fits = max(1, CACHE // each)
    return x.group * max(n for n in range(1, min(fits, batch * heads) + 1) if batch * heads % n == 0)


def forward(x: Arguments, pattern: Pattern, out: Tensor, lse: Tensor, recording: Recording | None = None) -> None:
    """Fill `out` `[B, Hq, Sq, Dv]`, contiguous rows, and `lse` `[B, Hq, Sq]`; rows of no document stay as they are."""
    batch, heads, q_len, dim = x.q.shape
    block = 64 if dim <= 64 else 128
    cut = cut_of(block)
    rows = 64 * cut.groups
    each = -(-q_len // rows)
    documents = None
    if x.cu_q is not None:
        each += x.cu_q.shape[0] - 2
        documents = _documents(x.cu_q, x.cu_k, each, rows, pattern if not pattern.left else None)
    scale, softcap = _factors(x)
    pieces = each * heads * batch
    sizes = (heads, x.group, section_of(x, pattern), q_len, x.k.shape[2], each, pieces, pattern.window, pattern.ahead)
    arguments = (
        *(_tiles(x.q, 64, block), _tiles(x.k, cut.keys, block), _tiles(x.v, cut.keys, block), _tiles(out, 64, block)),
        *(out, lse, x.sinks, documents, out.stride(1), out.stride(2)),
        *(*sizes, scale, softcap),
    )
    constants = {
        "DV": x.v.shape[-1],
        "BLOCK": block,
        "N": cut.keys,
        "STAGES": cut.stages,
        "CONSUMERS": cut.groups,
        "TURNS": cut.turns,
        "BOUNDED": softcap is not None,
        "LEFT": pattern.left,
        "RIGHT": pattern.right,
    }
    grid = min(pieces, num_multiprocessors(x.q.device.index))
    _launch(hopper_forward_kernel, grid, arguments, constants, recording)


def takes_gradients(x: Arguments, pattern: Pattern, d_out: Tensor) -> bool:
    """Whether the backward kernels take this call."""
    if x.q.shape[-1] <= 64 or reach_of(x, pattern) < LEAST_REACH or not ends_of(x, pattern):
        return False
    return takes(x, pattern) and can_copy(d_out)


def queries(
    x: Arguments,
    pattern: Pattern,
    out: Tensor,
    d_out: Tensor,
    lse: Tensor,
    d_lse: Tensor | None,
    lse2: Tensor,
    delta: Tensor,
    d_q: Tensor,
    recording: Recording | None = None,
) -> None:
    """Fill `d_q` and the row statistics that `keys` reads; rows of no document stay as they are."""
    batch, heads, q_len, dim = x.q.shape
    block = 64 if dim <= 64 else 128
    rows, stages = 128, 2
    each = -(-q_len // 128)
    documents = None
    if x.cu_q is not None:
        each += x.cu_q.shape[0] - 2
        documents = _documents(x.cu_q, x.cu_k, each, 128)
    arguments = (
        *(_tiles(x.q, 64, block), _tiles(d_out, 64, block), _tiles(x.k, rows, block), _tiles(x.v, rows, block)),
        *(out, d_out, lse, d_lse, lse2, delta, d_q, documents),
        *(stride for t in (out, d_out, d_q) for stride in t.stride()[:3]),
        *(lse2.stride(1), heads, x.group, q_len, x.k.shape[2], each, pattern.window, pattern.ahead),
        *(x.scale, *_factors(x)),
    )
    constants = {
        "D": dim,
        "DV": x.v.shape[-1],
        "BLOCK": block,
        "N": rows,
        "STAGES": stages,
        "LEFT": pattern.left,
        "RIGHT": pattern.right,
    }
    _launch(hopper_queries_kernel, each * heads * batch, arguments, constants, recording)


def keys(
    x: Arguments,
    pattern: Pattern,
    d_out: Tensor,
    lse2: Tensor,
    delta: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    recording: Recording | None = None,
) -> None:
    """Fill `d_k` and `d_v`; rows of no document stay as they are."""
    batch, heads_k, k_len, dim = x.k.shape
    block = 64 if dim <= 64 else 128
    rows = 64
    each = -(-k_len // 128)
    documents = None
    if x.cu_q is not None:
        each += x.cu_q.shape[0] - 2
        documents = _documents(x.cu_k, x.cu_q, each, 128)
    arguments = (
        *(_tiles(x.q, rows, block), _tiles(d_out, rows, block), _tiles(x.k, 64, block), _tiles(x.v, 64, block)),
        *(_rows(lse2, rows), _rows(delta, rows), d_k, d_v, documents),
        *(stride for t in (d_k, d_v) for stride in t.stride()[:3]),
        *(x.q.shape[1], x.group, x.q.shape[2], k_len, each, pattern.window, pattern.ahead, x.scale, *_factors(x)),
    )
    constants = {
        "D": dim,
        "DV": x.v.shape[-1],
        "BLOCK": block,
        "M": rows,
        "STAGES": 3,
        "LEFT": pattern.left,
        "RIGHT": pattern.right,
    }
    _launch(hopper_keys_kernel, each * heads_k * batch, arguments, constants, recording)


def _launch(
    kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any], recording: Recording | None
) -> None:
    if recording is None:
        launcher_of(kernel)((programs,), arguments, constants, num_warps=4)
    else:
        launcher_of(kernel).recorded(recording, (programs,), arguments, constants, num_warps=4)


def _factors(x: Arguments) -> tuple[float, float | None]:
    """What products are multiplied by, and the softcap: scores come out times log2(e)."""
    if x.softcap is None:
        return x.scale * math.log2(math.e), None
    return x.scale / x.softcap, x.softcap * math.log2(math.e)


def _documents(own: Tensor | None, other: Tensor | None, each: int, rows: int, sort: Pattern | None = None) -> Tensor:
    """The table of `document_tiles_kernel` for tiles of so many rows of one's own side; sorted by what they see of a
    full or causal mask, where programs share the tiles among them before they know how long one takes."""
    assert own is not None
    entries = torch.empty(each, 8, dtype=torch.int32, device=own.device)
    number = own.shape[0] - 1
    known = {"BLOCK": rows, "DOCUMENTS": 1 << (number - 1).bit_length()}
    known |= {"SORTED": sort is not None, "CAUSAL": sort is not None and sort.right}
    launcher_of(document_tiles_kernel)((each,), (entries, own, other, number), known, num_warps=1)
    return entries


def _tiles(t: Tensor, rows: int, columns: int) -> Any:
    """A descriptor of tiles of so many rows and columns."""
    return TensorDescriptor(t, list(t.shape), [*used_strides(t), 1], [1, 1, rows, columns], _SWIZZLED)


def _rows(t: Tensor, rows: int) -> Any:
    """The same for one number a row, `[B, H, padded]`."""
    return TensorDescriptor(t, [t.shape[0] * t.shape[1], t.shape[2]], [t.stride(1), 1], [1, rows], _PLAIN)


_SWIZZLED = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)  # as the tensor cores read rows
_PLAIN = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
