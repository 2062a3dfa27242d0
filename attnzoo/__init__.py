"""attnzoo: attention mechanisms for PyTorch, and the way from one to another.

Names are resolved on first use, so that `import attnzoo` costs no more than torch, and transformers is imported only
by `attnzoo.hf`, `attnzoo.swap` and `attnzoo.convert`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnzoo import caches, hf, layers, masks, ops
    from attnzoo.hf import convert, swap
    from attnzoo.layers import (
        GroupedQueryAttention,
        LinearAttention,
        MultiHeadAttention,
        MultiHeadLatentAttention,
        MultiQueryAttention,
        SlidingWindowAttention,
        SparseAttention,
    )
    from attnzoo.specs import GQA, MLA, Linear

__version__ = "0.1.0"

_HOME = {
    "GQA": "attnzoo.specs",
    "GroupedQueryAttention": "attnzoo.layers",
    "Linear": "attnzoo.specs",
    "LinearAttention": "attnzoo.layers",
    "MLA": "attnzoo.specs",
    "MultiHeadAttention": "attnzoo.layers",
    "MultiHeadLatentAttention": "attnzoo.layers",
    "MultiQueryAttention": "attnzoo.layers",
    "SlidingWindowAttention": "attnzoo.layers",
    "SparseAttention": "attnzoo.layers",
    "convert": "attnzoo.hf",
    "swap": "attnzoo.hf",
}
_ROOMS = ("caches", "hf", "layers", "masks", "ops")

__all__ = [
    "GQA",
    "MLA",
    "GroupedQueryAttention",
    "Linear",
    "LinearAttention",
    "MultiHeadAttention",
    "MultiHeadLatentAttention",
    "MultiQueryAttention",
    "SlidingWindowAttention",
    "SparseAttention",
    "caches",
    "convert",
    "hf",
    "layers",
    "masks",
    "ops",
    "swap",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"attnzoo.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'attnzoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
