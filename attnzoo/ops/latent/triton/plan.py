"""Tile sizes of the latent kernel, from the shape. No Triton here."""

from __future__ import annotations

from functools import lru_cache

from attnzoo.ops.decoding.triton.plan import Tiles, next_power_of_two

HOPPER = Tiles(64, 64, 4, 1, 1)  # of the kernel that arranges its own pipeline


@lru_cache(maxsize=256)
def tiles_for(rows: int, rank: int, itemsize: int, codes: bool, room: int) -> Tiles:
    """For `rows` queries of a row of the batch, latents of `rank` numbers, and elements of `itemsize` bytes.

    `room`: bytes of shared memory that a program may take.
    """
    block_m = min(max(next_power_of_two(rows), 16), 64)
    if itemsize == 4:
        return Tiles(16, 16, 4, 1, 1)
    if block_m == 64:
        # Before Hopper, products read from registers, and what brings 64 tokens there takes 56 KiB more.
        return Tiles(64, 64 if room >= 200 * 1024 else 32, 8, 2, 1)
    return Tiles(block_m, 64, 4, 3, 1)
