"""Launches of the Hopper kernel: which calls it takes, and how it cuts them."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnzoo.ops.launcher import Launcher, Recording
from attnzoo.ops.launching import capability, interpreted, num_multiprocessors
from attnzoo.ops.softmax.triton.shapes import Arguments, Pattern, ends_of

ENABLED = False
LEAST_QUERIES = 128  # fewer leave most of a program's rows empty
CACHE = 32 << 20  # bytes of keys and values that programs side by side may read: most of the L2 cache


class Cut(NamedTuple):
    """How the kernel cuts its work: keys in a tile, tiles in flight, and groups of 64 queries."""

    keys: int
    stages: int
    groups: int
    turns: bool  # one group's exponentials under another's products


def takes(x: Arguments, pattern: Pattern) -> bool:
    """Whether the kernel computes this call: full, causal and window masks, packed or not, with sinks or a softcap, in
    half precision and for heads up to 128 wide."""
    if not ENABLED or x.q.device.type != "cuda" or interpreted() or capability(x.q.device.index)[0] != 9:
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
    return q_len >= LEAST_QUERIES and all(_can_copy(t) for t in (x.q, x.k, x.v))


def cut_of(block: int) -> Cut:
    """By the columns of a tile."""
    return Cut(128, 3, 3, True) if block == 64 else Cut(64, 3, 2, True)


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
        assert x.cu_k is not None
        number = x.cu_q.shape[0] - 1
        each += number - 1
        documents = torch.empty(each, 8, dtype=torch.int32, device=x.q.device)
        known = {"BLOCK": rows, "DOCUMENTS": 1 << (number - 1).bit_length()}
        _launcher("documents")((each,), (documents, x.cu_q, x.cu_k, number), known, num_warps=1, num_stages=1)
    scale, softcap = x.scale * math.log2(math.e), None
    if x.softcap is not None:
        scale, softcap = x.scale / x.softcap, x.softcap * math.log2(math.e)
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
    if recording is None:
        _launcher("forward")((grid,), arguments, constants, num_warps=4)
    else:
        _launcher("forward").recorded(recording, (grid,), arguments, constants, num_warps=4)


@lru_cache(maxsize=2)
def _launcher(name: str) -> Launcher:
    if name == "documents":
        from attnzoo.ops.softmax.triton.documents import document_tiles_kernel

        return Launcher(document_tiles_kernel)
    from attnzoo.ops.softmax.triton.hopper import hopper_forward_kernel

    return Launcher(hopper_forward_kernel)


def _can_copy(t: Tensor) -> bool:
    """Whether the copy engine takes the tensor."""
    size = t.element_size()
    strides = [n for n, many in zip(t.stride()[:3], t.shape[:3], strict=True) if many > 1]
    return t.data_ptr() % 16 == 0 and t.stride(3) == 1 and all(n and n * size % 16 == 0 for n in strides)


def _tiles(t: Tensor, rows: int, columns: int) -> Any:
    """A descriptor of tiles of so many rows and columns."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    batch, heads, length, dim = t.shape
    # The stride of a dimension of one is never used, so that it may be any number.
    strides = [n if many > 1 else length * dim for n, many in zip(t.stride()[:3], t.shape[:3], strict=True)]
    return TensorDescriptor(t, [batch, heads, length, dim], [*strides, 1], [1, 1, rows, columns], _layout())


@lru_cache(maxsize=1)
def _layout() -> Any:
    """Rows of 64 numbers of 16 bits, swizzled as the tensor cores read them."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
