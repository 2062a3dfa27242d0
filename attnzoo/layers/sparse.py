"""Attention under any pattern: Longformer's (arXiv:2004.05150), BigBird's (arXiv:2007.14062), one of your own."""

from __future__ import annotations

from typing import Unpack

from attnzoo.layers.grouped_query import GroupedQueryAttention
from attnzoo.layers.multi_head import MasklessOptions
from attnzoo.masks import Mask


class SparseAttention(GroupedQueryAttention):
    """`GroupedQueryAttention` with a mask that has to be given.

    Args:
        dim: width of inputs and outputs.
        num_heads: heads of queries.
        mask: which query sees which key, for example `masks.longformer(512, 1)`; `masks.PerHead` for heads that differ.
        num_kv_heads: heads of keys and values; None: as many as of queries.
        **options: as of `GroupedQueryAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mask: Mask,
        *,
        num_kv_heads: int | None = None,
        **options: Unpack[MasklessOptions],
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        super().__init__(dim, num_heads, num_kv_heads, mask=mask, **options)
