"""Attention in a sliding window (Longformer, arXiv:2004.05150; Mistral, arXiv:2310.06825): the near keys only."""

from __future__ import annotations

from typing import Unpack

from attnzoo.layers.grouped_query import GroupedQueryAttention
from attnzoo.layers.multi_head import MasklessOptions
from attnzoo.masks import SlidingWindow


class SlidingWindowAttention(GroupedQueryAttention):
    """`GroupedQueryAttention` with the mask `SlidingWindow(window, ahead)`.

    Args:
        dim: width of inputs and outputs.
        num_heads: heads of queries.
        window: keys that a query sees up to its own, itself included, in tokens.
        num_kv_heads: heads of keys and values; None: as many as of queries.
        ahead: keys that a query sees after its own; 0: causal.
        **options: as of `GroupedQueryAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        *,
        num_kv_heads: int | None = None,
        ahead: int = 0,
        **options: Unpack[MasklessOptions],
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        super().__init__(dim, num_heads, num_kv_heads, mask=SlidingWindow(window, ahead), **options)
