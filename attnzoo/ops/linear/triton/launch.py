"""Launching the kernels: strides, buffers and the arguments that they share. Imports Triton only when it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.launcher import launcher_of
from attnzoo.ops.linear.triton.shapes import Config, Tiles, power_of_two


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel with its arguments, its constants and its options by name, on the first tensor's device."""
    launcher_of(kernel)(grid, arguments, options, num_warps=options["num_warps"], num_stages=options["num_stages"])


def rows_contiguous(t: Tensor) -> Tensor:
    """`t`, or a copy, with neighbouring columns beside each other."""
    return t if t.stride(-1) == 1 else t.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """Strides of batch, heads and tokens, tensor after tensor."""
    return [stride for t in tensors for stride in t.stride()[:3]]


def empty_like_heads(like: Tensor, width: int, dtype: torch.dtype, *, zero: bool = False) -> Tensor:
    """`[B, H, S, width]`, laid out as `[B, S, H, width]` where `like` is, so that merging the heads copies nothing."""
    batch, heads, length, _ = like.shape
    make = torch.zeros if zero else torch.empty
    if like.stride(1) < like.stride(2):
        return make(batch, length, heads, width, dtype=dtype, device=like.device).transpose(1, 2)
    return make(batch, heads, length, width, dtype=dtype, device=like.device)


def state_constants(config: Config, tiles: Tiles, normalize: bool, *, by_features: bool = False) -> dict[str, Any]:
    """Constants and launch options of any kernel: blocks are of the values' columns, or of the features'."""
    block_d, block_v = (power_of_two(size, config.least) for size in (config.dim, config.v_dim))
    if by_features:
        block_d = min(block_d, tiles.block)
    else:
        block_v = min(block_v, tiles.block)
    return {
        "NORMALIZE": normalize,
        "D": config.dim,
        "DV": config.v_dim,
        "BD": block_d,
        "BV": block_v,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def constants(
    config: Config,
    tiles: Tiles,
    normalize: bool,
    feature_map: str,
    *,
    by_features: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Constants and launch options of a kernel that walks over chunks."""
    more |= {"MAP": feature_map, "CHUNK": tiles.chunk, "COMPUTE": compute_type(config), "PRECISION": config.precision}
    return state_constants(config, tiles, normalize, by_features=by_features) | more


def compute_type(config: Config) -> Any:
    """Triton's name of what is multiplied."""
    import triton.language as tl

    return {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[config.compute]


def blocks(width: int, tiles: Tiles) -> int:
    """Programs that share the columns."""
    return -(-width // tiles.block)
