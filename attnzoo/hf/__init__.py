"""transformers models on attnzoo's attention.

Importing this registers `attn_implementation="attnzoo"`, and the classes of swapped models that no stock class holds.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from attnzoo.hf.attention import attnzoo_attention
from attnzoo.hf.auto import register
from attnzoo.hf.convert import convert
from attnzoo.hf.every import every
from attnzoo.hf.export import export
from attnzoo.hf.generation.bridge import graphed
from attnzoo.hf.generation.build import cache_for
from attnzoo.hf.generation.generate import generate
from attnzoo.hf.masks import attnzoo_mask
from attnzoo.hf.swap import swap

# Both, always: without a mask function transformers passes no mask at all, and padding would be attended to.
AttentionInterface.register("attnzoo", attnzoo_attention)
AttentionMaskInterface.register("attnzoo", attnzoo_mask)
register()

__all__ = [
    "attnzoo_attention",
    "attnzoo_mask",
    "cache_for",
    "convert",
    "every",
    "export",
    "generate",
    "graphed",
    "swap",
]
