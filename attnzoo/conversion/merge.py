"""Fewer KV heads for one layer. To add a method: a function in a file of its own, and its line in METHODS."""

from collections.abc import Callable

import torch

from attnzoo.conversion.errors import ConversionError
from attnzoo.conversion.families import Projections
from attnzoo.conversion.first import first
from attnzoo.conversion.mean import mean
from attnzoo.conversion.random import random

Method = Callable[[Projections, int, torch.Generator], Projections]

METHODS: dict[str, Method] = {"mean": mean, "first": first, "random": random}


def check_method(method: str) -> None:
    """Raise ConversionError for a method that is not in METHODS."""
    if method not in METHODS:
        raise ConversionError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def merge_heads(
    projections: Projections, num_kv_heads: int, method: str = "mean", seed: int = 0, *, layer: int = 0
) -> Projections:
    """One layer with `num_kv_heads` heads in k, v and their biases; q and o stay as they are.

    Groups are contiguous (arXiv 2305.13245): with 6 heads to 2, heads 0 1 2 become head 0. Sums are in fp32 (fp64 for
    fp64 weights), results in the weights' dtype. The number that is there already changes nothing, with any method.

    Args:
        projections: the layer's weights, k and v `[Hk, D, dim]`.
        num_kv_heads: a divisor of Hk.
        method: `mean`, `first` or `random`.
        seed, layer: what `random` depends on; each layer of a model gets other numbers from one seed.

    Raises:
        ConversionError: for a number that does not divide, or an unknown method.
    """
    check_method(method)
    have = projections.k.shape[0]
    if num_kv_heads < 1 or have % num_kv_heads:
        allowed = ", ".join(str(n) for n in range(1, have + 1) if have % n == 0)
        raise ConversionError(
            f"num_kv_heads must divide the layer's {have} KV heads, so be one of {allowed}; got {num_kv_heads}"
        )
    if num_kv_heads == have:
        return projections
    # Layers take far more than a thousand numbers each, so seeds are spread out by a large prime rather than added.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)
    return METHODS[method](projections, num_kv_heads, generator)
