"""Sizes of tiles by shape and GPU: a small table in place of tuning at run time.

Measured on an H200; docs/benchmarks/log.md says what else was tried. Two programs of four warps on each multiprocessor
beat one of eight nearly everywhere: one computes exponentials while the other multiplies.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """How a kernel cuts its work: rows of queries and of keys in a tile, warps, and stages of its pipeline."""

    m: int
    n: int
    warps: int
    stages: int


class Size(NamedTuple):
    """What decides the tiles."""

    dim: int
    v_dim: int
    dtype: torch.dtype
    capability: tuple[int, int]
    reach: int  # keys that a query may see, at most
    plain: bool = True  # no documents and no softcap

    @property
    def wide(self) -> int:
        return max(self.dim, self.v_dim)

    @property
    def hopper(self) -> bool:
        return self.capability >= (9, 0)


def forward_tiles(size: Size) -> Tiles:
    """For the forward kernel."""
    if size.dtype == torch.float32:
        return _fp32(size)
    if size.wide > 256:
        return Tiles(64, 32, 8, 1)
    if size.wide > 128:
        return Tiles(128, 64, 8, 3 if size.wide <= 192 else 2) if size.hopper else Tiles(64, 32, 4, 2)
    if size.wide > 64:
        return Tiles(64, 64, 4, 3) if size.hopper else Tiles(128, 64, 8, 2)
    if size.hopper and size.reach > 8192:
        return Tiles(64, 128, 4, 3)
    return Tiles(64, 64, 4, 3) if size.hopper else Tiles(128, 64, 4, 3)


def query_gradient_tiles(size: Size) -> Tiles:
    """For dQ."""
    if size.dtype == torch.float32:
        return _fp32(size)
    if size.wide > 128:
        return Tiles(128, 64 if size.wide <= 192 else 32, 8, 2) if size.hopper else Tiles(64, 32, 4, 1)
    if size.wide > 64:
        return Tiles(128, 64, 8, 3) if size.hopper and size.plain and size.reach > 2048 else Tiles(64, 64, 4, 2)
    return Tiles(128, 64, 4, 3) if size.hopper else Tiles(128, 64, 4, 2)


def key_gradient_tiles(size: Size) -> Tiles:
    """For dK and dV."""
    if size.dtype == torch.float32:
        return _fp32(size)
    if size.wide > 192:
        return Tiles(64, 64, 8, 2) if size.hopper else Tiles(32, 64, 4, 1)
    if size.wide > 128:
        return Tiles(32, 64, 4, 2)
    if size.wide > 64:
        return Tiles(64, 64, 4, 2)
    return Tiles(64, 64, 4, 3)


def bias_gradient_tiles(size: Size) -> Tiles:
    """For the bias, whose kernel holds tiles of q, k, v and the output's gradient at once."""
    if size.dtype != torch.float32 and size.wide > 128:
        return Tiles(64, 64 if size.hopper else 32, 4, 1)
    return query_gradient_tiles(size)


def _fp32(size: Size) -> Tiles:
    """For products without tensor cores, or of twice the bytes."""
    if size.wide > 128:
        return Tiles(16, 16, 4, 1)
    return Tiles(32, 32, 4, 1)
