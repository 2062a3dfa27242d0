"""Families with one `query_key_value`: for each KV head the rows of its query heads, then its key, then its value."""

from collections.abc import Mapping

import torch
from torch import Tensor

from attnzoo.conversion.families.base import Family, Geometry, Projections, shaped


class Fused(Family):
    """`query_key_value` [Hk, Hq / Hk + 2, d] and `dense`, `[out, in]`; biases where the model has them.

    With as many KV heads as query heads the rows are q k v head by head, with one they are all of q, then k, then v.
    """

    required = ("query_key_value.weight", "dense.weight")
    optional = ("query_key_value.bias", "dense.bias")
    buffers = ("bias", "masked_bias", "rotary_emb.inv_freq")

    def split(self, tensors: Mapping[str, Tensor], geometry: Geometry) -> Projections:
        self.check_names(tensors)
        g = geometry
        parts = (g.num_kv_heads, g.num_heads // g.num_kv_heads + 2, g.head_dim)
        rows = (g.num_heads + 2 * g.num_kv_heads) * g.head_dim
        q, k, v = _apart(shaped(tensors, "query_key_value.weight", *parts, g.dim, stored=(rows, g.dim)))
        stored = (g.dim, g.num_heads * g.head_dim)
        o = shaped(tensors, "dense.weight", g.dim, g.num_heads, g.head_dim, stored=stored)
        biases: tuple[Tensor | None, ...] = (None, None, None)
        if "query_key_value.bias" in tensors:
            biases = _apart(shaped(tensors, "query_key_value.bias", *parts, stored=(rows,)))
        o_bias = shaped(tensors, "dense.bias", g.dim) if "dense.bias" in tensors else None
        return Projections(q, k, v, o, biases[0], biases[1], biases[2], o_bias)

    def join(self, projections: Projections, geometry: Geometry) -> dict[str, Tensor]:
        p = projections
        tensors = {
            "query_key_value.weight": _together(p.q, p.k, p.v),
            "dense.weight": p.o.flatten(1, 2).contiguous(),
        }
        if p.q_bias is not None and p.k_bias is not None and p.v_bias is not None:
            tensors["query_key_value.bias"] = _together(p.q_bias, p.k_bias, p.v_bias)
        if p.o_bias is not None:
            tensors["dense.bias"] = p.o_bias
        return tensors


def _apart(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[Hk, Hq / Hk + 2, d, ...]` to q `[Hq, d, ...]`, k and v `[Hk, d, ...]`."""
    return groups[:, :-2].flatten(0, 1), groups[:, -2], groups[:, -1]


def _together(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The inverse of `_apart`, with the rows in one dimension."""
    return torch.cat((q.unflatten(0, (len(k), -1)), k[:, None], v[:, None]), dim=1).flatten(0, 2)
