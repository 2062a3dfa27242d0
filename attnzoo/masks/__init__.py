"""Attention patterns: one file each, combined with & and |."""

from attnzoo.masks.base import Mask, Tile, mask_from_dict
from attnzoo.masks.causal import Causal
from attnzoo.masks.combine import And, Or
from attnzoo.masks.documents import Documents
from attnzoo.masks.full import Full
from attnzoo.masks.sliding_window import SlidingWindow

__all__ = ["And", "Causal", "Documents", "Full", "Mask", "Or", "SlidingWindow", "Tile", "mask_from_dict"]
