"""Phi-3: one `qkv_proj` whose rows are all of q, then all of k, then all of v."""

from collections.abc import Mapping

import torch
from torch import Tensor

from attnzoo.conversion.families.base import Config, Family, Geometry, Projections, shaped, stock_geometry


class Phi3(Family):
    """`qkv_proj` and `o_proj`, `[out, in]`; no biases."""

    model_type = "phi3"
    required = ("qkv_proj.weight", "o_proj.weight")

    def geometry(self, config: Config) -> Geometry:
        return stock_geometry(config)

    def split(self, tensors: Mapping[str, Tensor], geometry: Geometry) -> Projections:
        self.check_names(tensors)
        g = geometry
        heads = (g.num_heads, g.num_kv_heads, g.num_kv_heads)
        q, k, v = shaped(tensors, "qkv_proj.weight", sum(heads), g.head_dim, g.dim).split(heads)
        stored = (g.dim, g.num_heads * g.head_dim)
        return Projections(q, k, v, shaped(tensors, "o_proj.weight", g.dim, g.num_heads, g.head_dim, stored=stored))

    def join(self, projections: Projections, geometry: Geometry) -> dict[str, Tensor]:
        p = projections
        qkv = torch.cat((p.q, p.k, p.v)).flatten(0, 1)
        return {"qkv_proj.weight": qkv, "o_proj.weight": p.o.flatten(1, 2).contiguous()}

    def _hold_kv_heads(self, config: Config, num_kv_heads: int) -> Config:
        return config | {"num_key_value_heads": num_kv_heads}

    def _hold_window(self, config: Config, window: int | None) -> Config:
        return config | {"sliding_window": window}


FAMILIES = (Phi3(),)
