"""transformers models on attnzoo's attention. Importing this registers `attn_implementation="attnzoo"`."""

from transformers import AttentionInterface, AttentionMaskInterface

from attnzoo.hf.attention import attnzoo_attention
from attnzoo.hf.convert import convert
from attnzoo.hf.masks import attnzoo_mask
from attnzoo.hf.swap import swap

# Both, always: without a mask function transformers passes no mask at all, and padding would be attended to.
AttentionInterface.register("attnzoo", attnzoo_attention)
AttentionMaskInterface.register("attnzoo", attnzoo_mask)

__all__ = ["attnzoo_attention", "attnzoo_mask", "convert", "swap"]
