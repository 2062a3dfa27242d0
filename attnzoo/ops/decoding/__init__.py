"""Attention of new tokens over a cache."""

from attnzoo.ops.decoding.api import choose, decode, explain_decode, explained
from attnzoo.ops.decoding.common import KeyValues, check_last, numbers
from attnzoo.ops.decoding.reach import check_reach, is_relative
from attnzoo.ops.decoding.stored import Rows, Stored, stored

__all__ = [
    "KeyValues",
    "Rows",
    "Stored",
    "check_last",
    "check_reach",
    "choose",
    "decode",
    "explain_decode",
    "explained",
    "is_relative",
    "numbers",
    "stored",
]
