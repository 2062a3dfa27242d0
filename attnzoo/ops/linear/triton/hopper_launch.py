"""Launches of the kernel for Hopper GPUs: which calls it takes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.launcher import Launcher
from attnzoo.ops.launching import capability, interpreted
from attnzoo.ops.linear.triton.shapes import Config, Parts

WIDTH = 64  # of heads
OPTIONS = {"STAGES": 3}


def takes(q: Tensor, k: Tensor, v: Tensor, out: Tensor, config: Config, *, causal: bool, full: bool) -> bool:
    """Whether the kernel attends here: to bf16 heads of 64, causal, all of whose chunks are whole, without a decay."""
    if q.device.type != "cuda" or interpreted() or capability(q.device.index)[0] != 9:
        return False
    whole = causal and full and config.compute == torch.bfloat16 and config.dim == config.v_dim == WIDTH
    return whole and all(_can_copy(t) for t in (q, k, v, out))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    inverses: Tensor,
    before: tuple[Tensor | None, ...],
    last: tuple[Tensor | None, Tensor | None],
    feature_map: str,
    normalize: bool,
    scale: float,
    parts: Parts,
) -> None:
    """Write out, inverses and the last state; `before` are the initial state and the sums of the parts."""
    heads, length = q.shape[1:3]
    tiles = [_tiles(t) for t in (q, k, v, out)]
    sizes = (heads, heads // k.shape[1], length, parts.parts, parts.part, scale)
    constants = {"NORMALIZE": normalize, "MAP": feature_map, **OPTIONS}
    _launcher()((parts.programs, heads), (*tiles, inverses, *before, *last, *sizes), constants, num_warps=4)


@lru_cache(maxsize=1)
def _launcher() -> Launcher:
    from attnzoo.ops.linear.triton.hopper import hopper_attend

    return Launcher(hopper_attend)


def _can_copy(t: Tensor) -> bool:
    """Whether the copy engine takes the tensor."""
    size = t.element_size()
    strides = [n for n, many in zip(t.stride()[:3], t.shape[:3], strict=True) if many > 1]
    return t.data_ptr() % 16 == 0 and t.stride(3) == 1 and all(n and n * size % 16 == 0 for n in strides)


def _tiles(t: Tensor) -> Any:
    """A descriptor of tiles of 64 rows."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    swizzled = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    # The stride of a dimension of one is never used, so that it may be any number.
    strides = [n if many > 1 else t[0, 0].numel() for n, many in zip(t.stride()[:3], t.shape[:3], strict=True)]
    return TensorDescriptor(t, list(t.shape), [*strides, 1], [1, 1, 64, WIDTH], swizzled)
