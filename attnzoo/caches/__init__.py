"""Caches of keys and values for decoding."""

from attnzoo.caches.base import Cache
from attnzoo.caches.contiguous import ContiguousCache

__all__ = ["Cache", "ContiguousCache"]
