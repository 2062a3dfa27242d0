"""GPTBigCode: `c_attn` is a Linear; its rows are q | k | v with one KV head, [H, 3, d] with as many as queries."""

from collections.abc import Mapping

import torch
from torch import Tensor

from attnzoo.conversion.errors import Refusal
from attnzoo.conversion.families.base import Config, Family, Geometry, Projections, shaped
from attnzoo.conversion.families.gpt2 import gpt2_geometry


class GPTBigCode(Family):
    """`c_attn` and `c_proj`, stored `[out, in]`; always biases."""

    model_type = "gpt_bigcode"
    base = "transformer."
    attention = "h.{layer}.attn"
    outside = ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")
    required = ("c_attn.weight", "c_attn.bias", "c_proj.weight", "c_proj.bias")
    buffers = ("bias", "masked_bias")
    rope = None

    def geometry(self, config: Config) -> Geometry:
        return gpt2_geometry(config, kv_heads=1 if config.get("multi_query", True) else None)

    def split(self, tensors: Mapping[str, Tensor], geometry: Geometry) -> Projections:
        self.check_names(tensors)
        h, hk, d, dim = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim, geometry.dim
        rows = h + 2 * hk
        weight = shaped(tensors, "c_attn.weight", rows, d, dim)
        bias = shaped(tensors, "c_attn.bias", rows, d)
        o = shaped(tensors, "c_proj.weight", dim, h, d, stored=(dim, dim))
        o_bias = shaped(tensors, "c_proj.bias", dim)
        if hk == 1:
            (q, k, v), biases = weight.split((h, 1, 1)), bias.split((h, 1, 1))
        else:
            (q, k, v), biases = weight.view(h, 3, d, dim).unbind(1), bias.view(h, 3, d).unbind(1)
        return Projections(q, k, v, o, biases[0], biases[1], biases[2], o_bias)

    def join(self, projections: Projections, geometry: Geometry) -> dict[str, Tensor]:
        p = projections
        together = torch.cat if geometry.num_kv_heads == 1 else _interleave
        return {
            "c_attn.weight": together((p.q, p.k, p.v)).flatten(0, -2),
            "c_attn.bias": together((p.q_bias, p.k_bias, p.v_bias)).flatten(),  # type: ignore[arg-type]
            "c_proj.weight": p.o.flatten(1, 2).contiguous(),
            "c_proj.bias": p.o_bias,  # type: ignore[dict-item]
        }

    def _hold_kv_heads(self, config: Config, num_kv_heads: int) -> Config:
        if num_kv_heads != 1:
            raise Refusal(
                f"GPTBigCode holds one KV head or as many as query heads, not num_kv_heads={num_kv_heads}; "
                "attnzoo.swap holds it in memory"
            )
        config.pop("num_key_value_heads", None)  # the class derives it, and a stored one would win over that
        return config | {"multi_query": True}


def _interleave(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(parts, dim=1)  # [H, 3, d, ...]


FAMILIES = (GPTBigCode(),)
