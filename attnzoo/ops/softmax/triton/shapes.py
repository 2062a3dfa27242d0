"""What a call is to the kernels: which sequences, which keys each query walks, and how tiles are cut."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.masks import Causal, Dilated, Full, Mask, SlidingWindow
from attnzoo.ops.softmax.common import mask_from_text
from attnzoo.ops.softmax.triton import patterns, walks
from attnzoo.ops.softmax.triton.config import Size, Tiles
from attnzoo.ops.softmax.triton.patterns import FAR


class Arguments(NamedTuple):
    """The operator's arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    bias: Tensor | None
    slopes: Tensor | None
    dense: Tensor | None
    key_lengths: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    seed: Tensor | None
    mask: Mask  # Full where `dense` is given
    scale: float
    softcap: float | None
    dropout_p: float

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]


class Pattern(NamedTuple):
    """A mask as the kernels know it: an interval of keys, walked by arithmetic, or a list of tiles."""

    left: bool  # -ahead <= i - j < window, where the two sides are asked for
    right: bool
    window: int
    ahead: int
    step: int  # positions apart that a sequence's rows are: a dilation
    program: tuple | None  # type: ignore[type-arg]
    tables: Tensor | None
    listed: bool


def pattern_of(x: Arguments, *, split: bool = True) -> Pattern:
    """The cheapest form in which the kernels can run a mask; without `split` one whose rows are neighbours."""
    mask = x.mask
    if isinstance(mask, Full):
        return Pattern(False, False, 0, 0, 1, None, None, False)
    if isinstance(mask, Causal):
        return Pattern(False, True, 0, 0, 1, None, None, False)
    if isinstance(mask, SlidingWindow):
        return Pattern(True, True, min(mask.window, FAR), min(mask.ahead, FAR), 1, None, None, False)
    if isinstance(mask, Dilated) and x.cu_q is None and split:
        # Each residue class of positions is a sequence of its own, in which the mask is a window without gaps.
        return Pattern(True, True, min(mask.window, FAR), min(mask.ahead, FAR), mask.dilation, None, None, False)
    program, tables = patterns.lower(mask, x.q.shape[1], x.q.shape[2], x.k.shape[2], x.q.device)
    # Documents' lengths are only known on the device, so that no list of tiles can be made for them.
    return Pattern(False, mask.causal, 0, 0, 1, program, tables, x.cu_q is None)


def reach_of(x: Arguments, pattern: Pattern) -> int:
    """Keys that a query may see, at most; of documents, whose lengths are not known here, on average."""
    reach = -(-x.k.shape[2] // pattern.step)
    if x.cu_q is not None:
        reach = reach // max(1, x.cu_q.shape[0] - 1)
    return min(reach, pattern.window + pattern.ahead) if pattern.left and pattern.right else reach


def size_of(x: Arguments, pattern: Pattern, capability: tuple[int, int]) -> Size:
    """What decides the tiles."""
    plain = x.softcap is None and x.cu_q is None
    return Size(x.q.shape[-1], x.v.shape[-1], x.q.dtype, capability, reach_of(x, pattern), plain)


def ends_of(x: Arguments, pattern: Pattern) -> int:
    """Which partial tiles may be read whole, as the kernels' ENDS: none, all, or those inside a document.

    A hidden key may be NaN, and so may a query that sees nothing. Where each query sees its own key there are none.
    """
    if x.dense is not None or x.bias is not None or x.key_lengths is not None:
        return 0
    if x.q.shape[2] != x.k.shape[2] or pattern.step > 1:
        return 0
    if x.cu_q is not None:
        same = x.cu_k is not None and x.cu_q.data_ptr() == x.cu_k.data_ptr()
        return 2 if same and pattern.program is None else 0
    return int(pattern.program is None or _sees_itself(x.mask.text, x.q.shape[2]))


@lru_cache(maxsize=256)
def _sees_itself(mask: str, length: int) -> bool:
    """Whether each of so many queries sees the key at its own position."""
    at = torch.arange(length)
    rule = mask_from_text(mask)
    return all(bool(rule.head(head).visible(at, at).all()) for head in range(rule.heads or 1))


def walk_of(x: Arguments, pattern: Pattern, tiles: Tiles, *, by_keys: bool) -> tuple[Tensor | None, ...]:
    """The four tensors of a `Walk`; None each where tiles are found by arithmetic."""
    if not pattern.listed:
        return (None, None, None, None)
    make = walks.columns if by_keys else walks.rows
    return make(x.mask, x.q.shape[1], x.q.shape[2], x.k.shape[2], tiles.m, tiles.n, x.q.device)


def head_blocks(dim: int, least: int = 16) -> tuple[int, int]:
    """Powers of two, `least` or more each, that hold a head_dim: one, or two where one is much too large (192, 576)."""
    whole = max(least, _power(dim))
    first = whole // 2
    if first < max(32, least) or dim <= first:
        return whole, 0
    rest = max(least, _power(dim - first))
    return (first, rest) if first + rest < whole else (whole, 0)


def least_columns(x: Arguments, capability: tuple[int, int]) -> int:
    """The fewest columns of a tile: products of Hopper's on rows under 128 bytes came out wrong in triton 3.6."""
    return max(16, 128 // x.q.element_size()) if capability >= (9, 0) else 16


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def precision(dtype: torch.dtype) -> str:
    """How fp32 products are made; PyTorch's own switch decides."""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"
