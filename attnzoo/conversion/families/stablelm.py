"""StableLM, which may have a norm for each head of q and k, stored head by head."""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.conversion.errors import ConversionError
from attnzoo.conversion.families.base import Config, Geometry, Projections, shaped, stock_geometry
from attnzoo.conversion.families.separate import Separate

_NORM = re.compile(r"[qk]_layernorm\.norms\.\d+\.weight")


class StableLM(Separate):
    """`q_proj k_proj v_proj o_proj`; with `qk_layernorm` also `q_layernorm.norms.0.weight` and so on, `[D]` each."""

    def __init__(self) -> None:
        super().__init__("stablelm", kv_heads=32, rotated=0.25)
        self.centred_norm = True

    def geometry(self, config: Config) -> Geometry:
        return stock_geometry(config, self._kv_heads)

    def check_names(self, names: Mapping[str, Tensor]) -> None:
        super().check_names({name: tensor for name, tensor in names.items() if not _NORM.fullmatch(name)})

    def split(self, tensors: Mapping[str, Tensor], geometry: Geometry) -> Projections:
        p = super().split(tensors, geometry)
        if not any(_NORM.fullmatch(name) for name in tensors):
            return p
        norms = {}
        for part, heads in (("q", geometry.num_heads), ("k", geometry.num_kv_heads)):
            names = [f"{part}_layernorm.norms.{head}.weight" for head in range(heads)]
            if missing := [name for name in names if name not in tensors]:
                raise ConversionError(f"a norm for each head needs {missing[0]}, and it is missing")
            norms[f"{part}_norm"] = torch.stack([shaped(tensors, name, geometry.head_dim) for name in names])
        return replace(p, **norms)

    def join(self, projections: Projections, geometry: Geometry) -> dict[str, Tensor]:
        p = projections
        tensors = super().join(replace(p, q_norm=None, k_norm=None), geometry)
        for part, norm in (("q", p.q_norm), ("k", p.k_norm)):
            if norm is not None:
                rows = {f"{part}_layernorm.norms.{head}.weight": row.clone() for head, row in enumerate(norm)}
                tensors |= rows
        return tensors


FAMILIES = (StableLM(),)
