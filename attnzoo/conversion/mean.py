"""Mean pooling, the GQA paper's choice (arXiv 2305.13245): a group's new head is the mean of its heads."""

import torch
from torch import Tensor

from attnzoo.conversion.families import Projections
from attnzoo.conversion.pooling import pool_heads


def mean(projections: Projections, num_kv_heads: int, generator: torch.Generator) -> Projections:
    """k, v and their biases averaged over contiguous groups. Heads that are equal come back bit for bit."""
    return pool_heads(projections, num_kv_heads, weights=_mean, biases=_mean)


def _mean(heads: Tensor) -> Tensor:
    # Around the first head: the plain mean of three equal fp32 numbers is not always that number.
    first = heads[:, 0]
    return first + (heads - first[:, None]).mean(dim=1)
