"""How many keys queries see, without the mask written out."""

from __future__ import annotations

from functools import lru_cache

import torch

from attnzoo.masks import Causal, Full, Mask, SlidingWindow

_ROWS = 512  # that stand for all, where no formula is known


@lru_cache(maxsize=256)
def visible_pairs(mask: Mask | None, tokens: int) -> int:
    """Query-key pairs that `mask` shows in a sequence of `tokens`; None is causal.

    Exact for full and causal attention and causal windows, and for any mask up to 512 tokens. Past that every other
    mask is counted on 512 rows in even steps. A mask that differs by head gives the mean over heads.
    """
    if mask is None or type(mask) is Causal:
        return tokens * (tokens + 1) // 2
    if type(mask) is Full:
        return tokens * tokens
    if type(mask) is SlidingWindow and mask.causal:
        near = min(mask.window, tokens)
        return near * tokens - near * (near - 1) // 2
    count = min(tokens, _ROWS)
    rows = [(2 * part + 1) * tokens // (2 * count) for part in range(count)]
    return round(sum(_row(mask, row, tokens) for row in rows) * tokens / count)


def visible_to_last(mask: Mask | None, tokens: int) -> int:
    """Keys that the last of `tokens` sees: what one step of decoding reads."""
    if mask is None or type(mask) in (Causal, Full):
        return tokens
    if type(mask) is SlidingWindow:
        return min(mask.window, tokens)
    return round(_row(mask, tokens - 1, tokens))


def _row(mask: Mask, row: int, tokens: int) -> float:
    seen = mask.visible(torch.tensor([[row]]), torch.arange(tokens)[None, :])
    return int(seen.sum()) / (mask.heads or 1)
