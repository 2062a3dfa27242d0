"""Multi-head attention (arXiv:1706.03762): every query head has keys and values of its own."""

from __future__ import annotations

from typing import TypedDict, Unpack

from attnzoo.layers.grouped_query import GroupedQueryAttention
from attnzoo.layers.rope import RotaryEmbedding
from attnzoo.masks import Mask


class MasklessOptions(TypedDict, total=False):
    """The keyword arguments of `GroupedQueryAttention`, with its defaults, but for the mask."""

    head_dim: int | None
    bias: bool
    out_bias: bool | None
    qk_norm: bool
    rope: RotaryEmbedding | None
    dropout: float
    scale: float | None
    softcap: float | None


class AttentionOptions(MasklessOptions, total=False):
    """All keyword arguments of `GroupedQueryAttention`, with its defaults."""

    mask: Mask | None


class MultiHeadAttention(GroupedQueryAttention):
    """`GroupedQueryAttention` with `num_kv_heads == num_heads`.

    Args:
        dim: width of inputs and outputs.
        num_heads: heads of queries, keys and values.
        **options: as of `GroupedQueryAttention`.
    """

    def __init__(self, dim: int, num_heads: int, **options: Unpack[AttentionOptions]) -> None:
        super().__init__(dim, num_heads, num_heads, **options)
