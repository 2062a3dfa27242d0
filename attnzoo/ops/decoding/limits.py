"""Masks as three numbers, which is all that the kernels over a cache know of them."""

from __future__ import annotations

from typing import NamedTuple

from attnzoo.masks import Causal, Full, GlobalTokens, Mask, SlidingWindow
from attnzoo.masks.combine import And, Or

UNBOUNDED = 2**30  # keys; no row is as long


class Limits(NamedTuple):
    """Query i sees key j iff -ahead <= i - j < back, or j < prefix and j <= i."""

    back: int
    ahead: int
    prefix: int = 0


def limits(mask: Mask, causal: bool = False) -> Limits | None:
    """The mask in these numbers, or None for one that they do not describe.

    They describe windows, the first tokens (`GlobalTokens(n) & Causal()`: attention sinks, arXiv 2309.17453), and both
    at once.

    Args:
        mask: any mask.
        causal: whether keys after the query's own are hidden besides.
    """
    if isinstance(mask, Full):
        return Limits(UNBOUNDED, 0 if causal else UNBOUNDED)
    if isinstance(mask, Causal):
        return Limits(UNBOUNDED, 0)
    if isinstance(mask, SlidingWindow):
        return Limits(min(mask.window, UNBOUNDED), 0 if causal else min(mask.ahead, UNBOUNDED))
    if isinstance(mask, GlobalTokens):  # without `causal` their own queries see what comes
        return Limits(0, 0, mask.tokens) if causal and isinstance(mask.tokens, int) else None
    if not isinstance(mask, And | Or):
        return None
    causal = causal or mask.causal
    a, b = limits(mask.first, causal), limits(mask.second, causal)
    if a is None or b is None:
        return None
    if isinstance(mask, Or):  # every window holds the query's own key, so that two are one
        return Limits(max(a.back, b.back), max(a.ahead, b.ahead), max(a.prefix, b.prefix))
    a, b = sorted((a, b))  # by how far they see back
    if (a.prefix or b.prefix) and b.back < UNBOUNDED:
        return None
    return Limits(a.back, min(a.ahead, b.ahead), a.prefix)
