"""Ways to cut positions into stretches, for `Mask.cut`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise


def chop(positions: range, size: int) -> list[range]:
    """The positions in stretches of at most `size`, as even as they can be."""
    pieces = -(-len(positions) // size)
    ends = [len(positions) * piece // pieces for piece in range(pieces + 1)] if pieces else []
    return [positions[a:b] for a, b in pairwise(ends)]


def chop_at_multiples(positions: range, block: int) -> list[range]:
    """The positions, ascending, in stretches that lie within one block of tokens each."""
    if not positions:
        return []
    return chop_before(positions, range(positions[0] // block * block + block, positions[-1] + 1, block))


def chop_before(positions: range, bounds: Iterable[int]) -> list[range]:
    """The positions, ascending, in stretches that end before each of `bounds`, ascending too."""
    ends = [0, *(bisect_left(positions, bound) for bound in bounds), len(positions)]
    return [positions[a:b] for a, b in pairwise(ends) if a < b]
