"""What the methods that pool heads share: contiguous groups of KV heads, one head out of each (arXiv 2305.13245)."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.conversion.families import Projections

Pool = Callable[[Tensor], Tensor]  # [groups, heads in a group, ...] in fp32 or fp64 -> [groups, ...]


def pool_heads(
    projections: Projections, num_kv_heads: int, weights: Pool, biases: Pool, norms: Pool | None = None
) -> Projections:
    """Pool the weights of k and v with one function and their biases with another; q and o stay as they are.

    Where every head has a norm of its own, or its part of one, their weights are pooled with `norms` (as the weights).
    The functions see fp32, or fp64 for fp64 weights; the result has the dtype of the original.
    """

    def pooled(tensor: Tensor | None, pool: Pool) -> Tensor | None:
        if tensor is None:
            return None
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        return pool(wide.unflatten(0, (num_kv_heads, -1))).to(tensor.dtype)

    p = projections
    changes = {"k": pooled(p.k, weights), "v": pooled(p.v, weights)}
    changes |= {"k_bias": pooled(p.k_bias, biases), "v_bias": pooled(p.v_bias, biases)}
    if p.k_norm is not None and p.k_norm.ndim == 2:
        changes["k_norm"] = pooled(p.k_norm, norms or weights)
    return replace(p, **changes)  # type: ignore[arg-type]
