"""Multi-query attention (arXiv:1911.02150): one head of keys and values for all query heads."""

from __future__ import annotations

from typing import Unpack

from attnzoo.layers.grouped_query import GroupedQueryAttention
from attnzoo.layers.multi_head import AttentionOptions


class MultiQueryAttention(GroupedQueryAttention):
    """`GroupedQueryAttention` with `num_kv_heads == 1`.

    Args:
        dim: width of inputs and outputs.
        num_heads: heads of queries.
        **options: as of `GroupedQueryAttention`.
    """

    def __init__(self, dim: int, num_heads: int, **options: Unpack[AttentionOptions]) -> None:
        super().__init__(dim, num_heads, 1, **options)
