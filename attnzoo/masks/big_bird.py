"""BigBird's pattern (arXiv 2007.14062): a window of blocks, global blocks and random blocks."""

from __future__ import annotations

from attnzoo.masks.base import Mask, check_integer
from attnzoo.masks.blockwise import Blockwise
from attnzoo.masks.causal import Causal
from attnzoo.masks.global_tokens import GlobalTokens
from attnzoo.masks.random_blocks import RandomBlocks
from attnzoo.masks.sliding_window import SlidingWindow


def big_bird(block: int = 64, *, random: int = 3, seed: int = 0, length: int | None = None) -> Mask:
    """BigBird's internal construction (ITC): its own block and one to each side, one global at each end, random ones.

    The random blocks are never among the others. In the published models each head draws its own:
    `PerHead([big_bird(64, seed=s, length=4096) for s in range(num_heads)])`.

    Args:
        block: tokens in a block.
        random: random blocks that each block of queries sees.
        seed: of the draws.
        length: tokens in the sequence, a multiple of the block. None: for a decoder, of any length; nobody sees later
            keys, the last block is not global and the random blocks are drawn among earlier ones.

    Raises:
        ValueError: for a length that is not a multiple of the block, and as the masks do.
    """
    if length is None:
        drawn = RandomBlocks(random, block, seed, near=1, edge=1)
        return (Blockwise(SlidingWindow(2), block) | GlobalTokens(block) | drawn) & Causal()
    check_integer("block", block, 1)
    check_integer("length", length, 1)
    if length % block:
        raise ValueError(f"length must be a multiple of block ({block}), got {length}")
    ends = GlobalTokens([*range(block), *range(length - block, length)])
    drawn = RandomBlocks(random, block, seed, length=length, near=1, edge=1)
    return Blockwise(SlidingWindow(2, ahead=1), block) | ends | drawn


if __name__ == "__main__":
    from attnzoo.masks.drawing import main

    main(big_bird(4, random=2, length=64), name="big_bird")
