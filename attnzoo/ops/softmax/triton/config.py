"""Sizes of tiles by shape and GPU: a small table in place of tuning at run time."""

from __future__ import annotations

import torch

from attnzoo.ops.softmax.triton.shapes import Tiles


def forward_tiles(dim: int, v_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """For the forward kernel."""
    wide = max(dim, v_dim)
    if dtype == torch.float32:
        return Tiles(64, 32, 4, 2) if wide <= 64 else Tiles(32, 32, 4, 1) if wide <= 256 else Tiles(16, 16, 4, 1)
    if wide > 256:
        return Tiles(64, 32, 8, 1)
    if wide > 128:
        return Tiles(128, 64, 8, 2) if capability >= (9, 0) else Tiles(64, 32, 4, 2)
    if wide > 64:
        return Tiles(128, 64, 8, 3) if capability >= (9, 0) else Tiles(128, 64, 8, 2)
    return Tiles(128, 64, 4, 3)


def query_gradient_tiles(dim: int, v_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """For dQ."""
    wide = max(dim, v_dim)
    if dtype == torch.float32:
        return Tiles(32, 32, 4, 1) if wide <= 128 else Tiles(16, 16, 4, 1)
    if wide > 128:
        return Tiles(64, 32, 4, 1)
    if wide > 64:
        return Tiles(128, 64, 8, 2) if capability >= (9, 0) else Tiles(64, 64, 4, 2)
    return Tiles(128, 64, 4, 2)


def key_gradient_tiles(dim: int, v_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """For dK and dV."""
    wide = max(dim, v_dim)
    if dtype == torch.float32:
        return Tiles(32, 32, 4, 1) if wide <= 128 else Tiles(16, 16, 4, 1)
    if wide > 128:
        return Tiles(32, 64, 4, 1)
    if wide > 64:
        return Tiles(64, 128, 8, 2) if capability >= (9, 0) else Tiles(64, 64, 4, 2)
    return Tiles(64, 128, 8, 2)
