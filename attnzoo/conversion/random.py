"""New random heads: the GQA paper's baseline (arXiv 2305.13245), what uptraining does without a head start."""

import torch
from torch import Tensor

from attnzoo.conversion.families import Projections
from attnzoo.conversion.pooling import pool_heads


def random(projections: Projections, num_kv_heads: int, generator: torch.Generator) -> Projections:
    """k and v normal with mean 0 and the root mean square of the weights they replace; biases 0, as in a new model.

    The numbers are drawn on the CPU, so that every device gives the same.
    """

    def drawn(heads: Tensor) -> Tensor:
        noise = torch.randn(heads[:, 0].shape, generator=generator, dtype=heads.dtype).to(heads.device)
        return noise * heads.square().mean().sqrt()

    return pool_heads(
        projections,
        num_kv_heads,
        weights=drawn,
        biases=lambda heads: torch.zeros_like(heads[:, 0]),
        norms=lambda heads: heads.mean(1),
    )
