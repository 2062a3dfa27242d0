"""Caches of keys and values for decoding."""

from attnzoo.caches.base import Cache
from attnzoo.caches.contiguous import ContiguousCache
from attnzoo.caches.latent import LatentCache
from attnzoo.caches.recurrent import RecurrentStateCache

__all__ = ["Cache", "ContiguousCache", "LatentCache", "RecurrentStateCache"]
