"""What a mask means for a cache that has dropped its oldest tokens."""

from __future__ import annotations

from attnzoo.masks import Dilated, Mask
from attnzoo.masks.combine import And, Or
from attnzoo.masks.per_head import PerHead
from attnzoo.ops.decoding.common import KeyValues
from attnzoo.ops.decoding.limits import UNBOUNDED, limits


def reach(mask: Mask | None, prefix: int = 0) -> int | None:
    """How many keys up to its own, itself included, a query may have to look back to; None: no bound is known.

    Args:
        mask: any mask.
        prefix: first tokens that count as near, since they are held whatever is dropped.
    """
    limit = None if mask is None else limits(mask)
    if limit is not None and limit.prefix <= prefix:
        return max(limit.back, 1) if limit.back < UNBOUNDED else None
    if isinstance(mask, Dilated):
        return (mask.window - 1) * mask.dilation + 1
    if isinstance(mask, And):
        return min((far for far in (reach(mask.first), reach(mask.second)) if far is not None), default=None)
    parts = mask.masks if isinstance(mask, PerHead) else (mask.first, mask.second) if isinstance(mask, Or) else ()
    bounds = [far for far in map(reach, parts) if far is not None]
    return max(bounds) if bounds and len(bounds) == len(parts) else None


def first_tokens(mask: Mask | None) -> int:
    """How many of a row's first tokens every later query sees, which a cache has to hold beside a window's."""
    limit = None if mask is None else limits(mask)
    return 0 if limit is None else limit.prefix


def is_relative(mask: Mask, prefix: int = 0) -> bool:
    """Whether it is sure that the mask depends on the distance of query and key alone, and on which are the first keys.

    Args:
        mask: any mask.
        prefix: keys that stay the first ones.
    """
    limit = limits(mask)
    if limit is not None and limit.prefix <= prefix:
        return True
    if isinstance(mask, And | Or):
        return is_relative(mask.first) and is_relative(mask.second)
    if isinstance(mask, PerHead):
        return all(map(is_relative, mask.masks))
    return isinstance(mask, Dilated)


def check_reach(mask: Mask, q_len: int, cache: KeyValues) -> None:
    """ValueError for a mask that shows a query what the cache may have dropped."""
    kept = cache.kept
    if kept is None or cache.length <= kept:
        return
    far = reach(mask, getattr(cache, "prefix", 0))
    if far is None or q_len - 1 + far > kept:
        sees = "any key before it" if far is None else f"{far} keys up to its own"
        raise ValueError(
            f"mask {mask} lets a query see {sees}; with {q_len} queries the cache would have to hold more than "
            f"the last {kept} of {cache.length} tokens"
        )
