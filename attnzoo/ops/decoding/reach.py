"""What a mask means for a cache that has dropped its oldest tokens."""

from __future__ import annotations

from attnzoo.masks import Causal, Dilated, Full, Mask, SlidingWindow
from attnzoo.masks.combine import And, Or
from attnzoo.masks.per_head import PerHead
from attnzoo.ops.decoding.common import KeyValues


def reach(mask: Mask | None) -> int | None:
    """How many keys up to its own, itself included, a query may have to look back to; None: no bound is known."""
    if isinstance(mask, SlidingWindow):
        return mask.window
    if isinstance(mask, Dilated):
        return (mask.window - 1) * mask.dilation + 1
    if isinstance(mask, And):
        return min((far for far in (reach(mask.first), reach(mask.second)) if far is not None), default=None)
    parts = mask.masks if isinstance(mask, PerHead) else (mask.first, mask.second) if isinstance(mask, Or) else ()
    bounds = [far for far in map(reach, parts) if far is not None]
    return max(bounds) if bounds and len(bounds) == len(parts) else None


def is_relative(mask: Mask) -> bool:
    """Whether it is sure that the mask depends on the distance of query and key alone."""
    if isinstance(mask, And | Or):
        return is_relative(mask.first) and is_relative(mask.second)
    if isinstance(mask, PerHead):
        return all(map(is_relative, mask.masks))
    return isinstance(mask, Full | Causal | SlidingWindow | Dilated)


def check_reach(mask: Mask, q_len: int, cache: KeyValues) -> None:
    """ValueError for a mask that shows a query what the cache may have dropped."""
    kept = cache.kept
    if kept is None or cache.length <= kept:
        return
    far = reach(mask)
    if far is None or q_len - 1 + far > kept:
        sees = "any key before it" if far is None else f"{far} keys up to its own"
        raise ValueError(
            f"mask {mask} lets a query see {sees}; with {q_len} queries the cache would have to hold more than "
            f"the last {kept} of {cache.length} tokens"
        )
