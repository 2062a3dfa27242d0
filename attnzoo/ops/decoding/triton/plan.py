"""How a call is cut into programs: tile sizes from the shape, the number of splits from the machine."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from attnzoo.ops.launching import capability, interpreted

MOST_SPLITS = 128


class Merge(NamedTuple):
    """How the programs of a call merge what they have found: see `merge_here`."""

    share: int  # queries that each merges; 0: the last to come merges all
    rows: int  # queries, splits and numbers of a value that it has in registers at a time
    splits: int
    width: int


class Tiles(NamedTuple):
    """Tile sizes and launch options of one kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    resident: int  # programs that fit on a multiprocessor
    integers: bool = False  # whether codes are multiplied as they are


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


@lru_cache(maxsize=256)
def fitted(tiles: Tiles, query_bytes: int, key_bytes: int, limit: int) -> Tiles:
    """The tiles with fewer stages, then fewer keys, until they fit into `limit` bytes of shared memory.

    Args:
        tiles: what is best where there is room (an H200 has 227 KiB a program).
        query_bytes: of a query's vectors.
        key_bytes: of a key with its value.
        limit: bytes.
    """

    def taken(tiles: Tiles) -> int:
        buffers = tiles.num_stages - 1 + (tiles.block_m >= 64)  # warpgroup products read theirs a little longer
        return tiles.block_m * query_bytes + max(buffers, 1) * tiles.block_n * key_bytes + 4096

    while taken(tiles) > limit and tiles.num_stages > 1:
        tiles = tiles._replace(num_stages=tiles.num_stages - 1)
    while taken(tiles) > limit and tiles.block_n > 16:
        tiles = tiles._replace(block_n=tiles.block_n // 2)
    return tiles


@lru_cache(maxsize=64)
def shared_memory(index: int | None) -> int:
    """Bytes of shared memory that a program may take on a CUDA device."""
    if interpreted():
        return 227 * 1024
    from triton.runtime import driver

    most = driver.active.utils.get_device_properties(torch.cuda.current_device() if index is None else index)
    # Blackwell's products take room of their own: 64 KiB more than on Hopper for the largest kernel here.
    return most["max_shared_mem"] - (64 * 1024 if capability(index) >= (10, 0) else 0)


@lru_cache(maxsize=256)
def tiles_for(rows: int, dim: int, v_dim: int, itemsize: int, codes: bool, page: int = 0, reach: int = 2**30) -> Tiles:
    """Measured on an H200; for `rows` queries of a key/value head, vectors of `dim` and `v_dim`.

    Args:
        rows: queries of all heads of a group.
        dim, v_dim: size of a key and of a value.
        itemsize: bytes of a query's element.
        codes: whether keys and values are int8.
        page: tokens of a page; 0: no pages. A tile within one page needs one look-up.
        reach: keys that the queries see at most; the tiles at the edges of a window are not pipelined.
    """
    block_m = min(max(next_power_of_two(rows), 16), 64)
    width = next_power_of_two(dim) + next_power_of_two(v_dim)
    if itemsize == 4:
        return Tiles(min(block_m, 32), 32, 4, 2, 2)
    if codes and min(dim, v_dim) >= 64 and dim.bit_count() == v_dim.bit_count() == 1:
        if rows <= 8:  # many programs of one warp: nothing to wait for but memory
            return Tiles(8, 64, 1, 3, 4, True)
        return Tiles(16, 64, 2, 3, 4, True) if rows <= 16 else Tiles(32, 64, 4, 3, 3, True)
    if codes:
        return Tiles(min(block_m, 32), 64, 4, 3, 2)
    if width > 256:
        return Tiles(block_m, 64 if width < 512 else 32, 4, 3, 1)
    if 0 < page < 128:  # a tile of several pages has an address for each token: more warps, fewer of them each
        return Tiles(block_m, 128, 8, 3, 1) if block_m == 16 else Tiles(block_m, 64, 4, 4, 1)
    if width <= 128 and block_m == 16 and reach >= 4096 and (page == 0 or page >= 256):
        return Tiles(16, 256, 4, 3, 1)  # as many bytes a tile as of vectors twice as long
    # Half of 64 rows wasted still beats 32: from there on products read shared memory themselves (wgmma).
    return Tiles(64 if block_m == 32 else block_m, 128, 4, 3, 1)


@lru_cache(maxsize=4096)
def merge_for(rows: int, splits: int, v_dim: int, num_warps: int) -> Merge:
    """For `rows` queries a program, cut into `splits`."""
    block_s, width = next_power_of_two(splits), max(next_power_of_two(v_dim), 16)
    share = 0
    if rows * splits * v_dim > 2**14:  # 64 KiB: more than one program reads at once
        share = -(-rows // splits)
    room = 2048 * num_warps  # 64 registers a thread
    block_m = min(max(room // (block_s * width), 1), next_power_of_two(share or rows))
    return Merge(share, block_m, block_s, min(max(room // (block_s * block_m), 16), width))


def merge_constants(merge: Merge) -> dict[str, int]:
    """As the kernels name them."""
    return {"SHARE": merge.share, "MERGE_M": merge.rows, "MERGE_S": merge.splits, "MERGE_DV": merge.width}


@lru_cache(maxsize=4096)
def splits_for(programs: int, tiles: int, slots: int) -> int:
    """Into how many parts `tiles` key tiles are split where `programs` programs would run without, `slots` at a time.

    The cheapest of all by a small model: programs run in waves, each costs its tiles and about two more to begin and to
    end, and merging costs about two tiles and a little for each part.
    """

    def cost(splits: int) -> float:
        waves = -(-programs * splits // slots)
        merging = 2 + splits / 32 if splits > 1 else 0
        return waves * (-(-tiles // splits) + 2) + merging

    return min(range(1, max(min(tiles, MOST_SPLITS), 1) + 1), key=cost)
