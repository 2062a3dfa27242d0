"""Attention as modules: project, rotate, cache, attend, project."""

from attnzoo.layers.grouped_query import GroupedQueryAttention
from attnzoo.layers.multi_head import MultiHeadAttention
from attnzoo.layers.multi_query import MultiQueryAttention
from attnzoo.layers.rope import RotaryEmbedding, apply_rotary

__all__ = [
    "GroupedQueryAttention",
    "MultiHeadAttention",
    "MultiQueryAttention",
    "RotaryEmbedding",
    "apply_rotary",
]
