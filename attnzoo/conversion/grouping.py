"""Which KV heads share a new one: neighbours, or those that the text shows to be alike (arXiv 2406.14963)."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from attnzoo.conversion.families import Projections
from attnzoo.conversion.planes import TINY

Grouping = Literal["order", "similarity"]


def group_alike(p: Projections, num_kv_heads: int, moment: Tensor) -> Projections:
    """The same attention with its heads in another order: heads that are alike become neighbours, and so a group.

    KV heads move with their query heads and the columns of o. Two heads are alike by what their keys, and their values,
    share of the space of inputs: the nuclear norms of their products under `moment` `[dim + 1, dim + 1]`, which no turn
    of either changes. Groups are filled greedily, the most alike pair first.
    """
    heads, size = p.k.shape[0], p.k.shape[0] // num_kv_heads
    if size in (1, heads):
        return p
    alike = _alike(p.k, moment) + _alike(p.v, moment)
    left, order = set(range(heads)), []
    while left:
        some = sorted(left)
        pairs = alike[some][:, some].clone().fill_diagonal_(-1.0)
        group = [some[int(pairs.max(dim=1).values.argmax())]]
        while len(group) < size:
            rest = [head for head in some if head not in group]
            group.append(max(rest, key=lambda head: float(alike[head, group].sum())))
        order += sorted(group)
        left -= set(group)
    return _ordered(p, torch.tensor(order))


def _alike(heads: Tensor, moment: Tensor) -> Tensor:
    """`[H, H]`, 1 for heads that are the same up to a turn and a factor."""
    rows = heads.double()
    inner = moment[:-1, :-1]
    products = torch.einsum("axi,ij,byj->abxy", rows, inner, rows)
    shared = torch.linalg.matrix_norm(products, "nuc")
    sizes = torch.einsum("aaxx->a", products)
    return shared / (sizes[:, None] * sizes).sqrt().clamp_min(TINY)


def _ordered(p: Projections, order: Tensor) -> Projections:
    queries = (order[:, None] * (p.q.shape[0] // len(order)) + torch.arange(p.q.shape[0] // len(order))).flatten()
    changes: dict[str, Tensor] = {"o": p.o[:, queries]}
    for name in ("k", "v", "k_bias", "v_bias", "k_norm"):
        tensor = getattr(p, name)
        if tensor is not None and (name != "k_norm" or tensor.ndim == 2):
            changes[name] = tensor[order]
    for name in ("q", "q_bias", "q_norm"):
        tensor = getattr(p, name)
        if tensor is not None and (name != "q_norm" or tensor.ndim == 2):
            changes[name] = tensor[queries]
    return replace(p, **changes)
