"""Attention of new tokens over a cache."""

from attnzoo.ops.decoding.api import KeyValues, decode

__all__ = ["KeyValues", "decode"]
