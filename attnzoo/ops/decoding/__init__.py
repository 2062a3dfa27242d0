"""Attention of new tokens over a cache."""

from attnzoo.ops.decoding.api import decode

__all__ = ["decode"]
