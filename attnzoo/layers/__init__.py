"""Attention as modules: project, rotate, cache, attend, project."""

from attnzoo.layers.feature_maps import Hedgehog, RandomFeatures
from attnzoo.layers.grouped_query import GroupedQueryAttention
from attnzoo.layers.latent import MultiHeadLatentAttention
from attnzoo.layers.linear import LinearAttention
from attnzoo.layers.multi_head import MultiHeadAttention
from attnzoo.layers.multi_query import MultiQueryAttention
from attnzoo.layers.rope import RotaryEmbedding, apply_rotary
from attnzoo.layers.sliding_window import SlidingWindowAttention
from attnzoo.layers.sparse import SparseAttention

__all__ = [
    "GroupedQueryAttention",
    "Hedgehog",
    "LinearAttention",
    "MultiHeadAttention",
    "MultiHeadLatentAttention",
    "MultiQueryAttention",
    "RandomFeatures",
    "RotaryEmbedding",
    "SlidingWindowAttention",
    "SparseAttention",
    "apply_rotary",
]
