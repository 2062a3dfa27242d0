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
    from attnzoo.layers import GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention
    from attnzoo.specs import GQA

__version__ = "0.1.0"

_HOME = {
    "GQA": "attnzoo.specs",
    "GroupedQueryAttention": "attnzoo.layers",
    "MultiHeadAttention": "attnzoo.layers",
    "MultiQueryAttention": "attnzoo.layers",
    "convert": "attnzoo.hf",
    "swap": "attnzoo.hf",
}
_ROOMS = ("caches", "hf", "layers", "masks", "ops")

__all__ = [
    "GQA",
    "GroupedQueryAttention",
    "MultiHeadAttention",
    "MultiQueryAttention",
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
