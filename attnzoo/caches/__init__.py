"""Caches of keys and values for decoding; names are resolved on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnzoo.caches.base import Cache
    from attnzoo.caches.contiguous import ContiguousCache
    from attnzoo.caches.int8 import Int8Cache
    from attnzoo.caches.latent import LatentCache
    from attnzoo.caches.padding import to_left_padding, to_right_padding
    from attnzoo.caches.paged import PagedCache
    from attnzoo.caches.paged_int8 import PagedInt8Cache
    from attnzoo.caches.pages import OutOfPages
    from attnzoo.caches.recurrent import RecurrentStateCache
    from attnzoo.caches.rolling import RollingCache

_FILES = {
    "Cache": "base",
    "ContiguousCache": "contiguous",
    "Int8Cache": "int8",
    "LatentCache": "latent",
    "OutOfPages": "pages",
    "PagedCache": "paged",
    "PagedInt8Cache": "paged_int8",
    "RecurrentStateCache": "recurrent",
    "RollingCache": "rolling",
    "to_left_padding": "padding",
    "to_right_padding": "padding",
}

__all__ = [
    "Cache",
    "ContiguousCache",
    "Int8Cache",
    "LatentCache",
    "OutOfPages",
    "PagedCache",
    "PagedInt8Cache",
    "RecurrentStateCache",
    "RollingCache",
    "to_left_padding",
    "to_right_padding",
]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module 'attnzoo.caches' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"attnzoo.caches.{_FILES[name]}"), name)
    globals()[name] = value
    return value
