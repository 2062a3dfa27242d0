"""Attention patterns: one file each, combined with & and |.

Names are resolved on first use, so that a pattern's file also runs by itself: `python -m attnzoo.masks.causal`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attnzoo.masks.base import Mask, Span, Tile, mask_from_dict

if TYPE_CHECKING:
    from attnzoo.masks.big_bird import big_bird
    from attnzoo.masks.blockwise import Blockwise
    from attnzoo.masks.causal import Causal
    from attnzoo.masks.combine import And, Or
    from attnzoo.masks.dilated import Dilated
    from attnzoo.masks.documents import Documents
    from attnzoo.masks.full import Full
    from attnzoo.masks.global_tokens import GlobalTokens
    from attnzoo.masks.longformer import longformer
    from attnzoo.masks.per_head import PerHead
    from attnzoo.masks.random_blocks import RandomBlocks
    from attnzoo.masks.sliding_window import SlidingWindow

_HOME = {
    "And": "combine",
    "Blockwise": "blockwise",
    "Causal": "causal",
    "Dilated": "dilated",
    "Documents": "documents",
    "Full": "full",
    "GlobalTokens": "global_tokens",
    "Or": "combine",
    "PerHead": "per_head",
    "RandomBlocks": "random_blocks",
    "SlidingWindow": "sliding_window",
    "big_bird": "big_bird",
    "longformer": "longformer",
}

__all__ = [
    "And",
    "Blockwise",
    "Causal",
    "Dilated",
    "Documents",
    "Full",
    "GlobalTokens",
    "Mask",
    "Or",
    "PerHead",
    "RandomBlocks",
    "SlidingWindow",
    "Span",
    "Tile",
    "big_bird",
    "longformer",
    "mask_from_dict",
]


def load_patterns() -> dict[str, type[Mask]]:
    """Every pattern by its name, those of this package loaded."""
    for name in _HOME:
        __getattr__(name)  # importing a module alone would leave it under its own name, where a function's may stand
    return Mask.patterns


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'attnzoo.masks' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"attnzoo.masks.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
