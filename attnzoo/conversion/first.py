"""The first head of each group: the GQA paper's second choice (arXiv 2305.13245)."""

import torch
from torch import Tensor

from attnzoo.conversion.families import Projections
from attnzoo.conversion.pooling import pool_heads


def first(projections: Projections, num_kv_heads: int, generator: torch.Generator) -> Projections:
    """k, v and their biases taken from the first head of each contiguous group."""
    return pool_heads(projections, num_kv_heads, weights=_first, biases=_first)


def _first(heads: Tensor) -> Tensor:
    return heads[:, 0]
