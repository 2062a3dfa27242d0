"""Launches of the kernel for Hopper GPUs: which calls it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.launcher import launcher_of
from attnzoo.ops.launching import can_copy, capability, interpreted, used_strides
from attnzoo.ops.linear.triton.shapes import Config, Parts

WIDTH = 64  # of heads
OPTIONS = {"STAGES": 3}


def takes(q: Tensor, k: Tensor, v: Tensor, out: Tensor, config: Config, *, causal: bool, full: bool) -> bool:
    """Whether the kernel attends here: to bf16 heads of 64, causal, all of whose chunks are whole, without a decay."""
    if q.device.type != "cuda" or interpreted() or capability(q.device.index)[0] != 9:
        return False
    whole = causal and full and config.compute == torch.bfloat16 and config.dim == config.v_dim == WIDTH
    return whole and all(can_copy(t) for t in (q, k, v, out))


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
    from attnzoo.ops.linear.triton.hopper import hopper_attend

    heads, length = q.shape[1:3]
    tiles = [_tiles(t) for t in (q, k, v, out)]
    sizes = (heads, heads // k.shape[1], length, parts.parts, parts.part, scale)
    constants = {"NORMALIZE": normalize, "MAP": feature_map, **OPTIONS}
    arguments = (*tiles, inverses, *before, *last, *sizes)
    grid = q.shape[0] * heads, parts.parts
    launcher_of(hopper_attend)(grid, arguments, constants, num_warps=4, launch_pdl=before[2] is not None)


def _tiles(t: Tensor) -> Any:
    """A descriptor of tiles of 64 rows."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    swizzled = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(t, list(t.shape), [*used_strides(t), 1], [1, 1, 64, WIDTH], swizzled)
