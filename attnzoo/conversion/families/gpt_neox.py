"""GPT-NeoX: `query_key_value` holds q, k and v head by head, [H, 3, d]; the class has no fewer KV heads."""

from collections.abc import Mapping

import torch
from torch import Tensor

from attnzoo.conversion.errors import Refusal
from attnzoo.conversion.families.base import Config, Family, Geometry, Projections, shaped, stock_geometry


class GPTNeoX(Family):
    """`query_key_value` and `dense`, `[out, in]`; both with biases or both without."""

    model_type = "gpt_neox"
    base = "gpt_neox."
    attention = "layers.{layer}.attention"
    outside = ("embed_in.weight", "final_layer_norm.weight", "final_layer_norm.bias")
    required = ("query_key_value.weight", "dense.weight")
    optional = ("query_key_value.bias", "dense.bias")
    buffers = ("bias", "masked_bias", "rotary_emb.inv_freq")
    rotated = 0.25

    def geometry(self, config: Config) -> Geometry:
        # The class reads neither key, whatever a config.json may carry.
        ignored = ("num_key_value_heads", "head_dim")
        return stock_geometry({key: value for key, value in config.items() if key not in ignored})

    def split(self, tensors: Mapping[str, Tensor], geometry: Geometry) -> Projections:
        self.check_names(tensors)
        h, d, dim = geometry.num_heads, geometry.head_dim, geometry.dim
        qkv = shaped(tensors, "query_key_value.weight", h, 3, d, dim, stored=(3 * h * d, dim))
        o = shaped(tensors, "dense.weight", dim, h, d, stored=(dim, h * d))
        biases: tuple[Tensor | None, ...] = (None, None, None)
        if "query_key_value.bias" in tensors:
            biases = shaped(tensors, "query_key_value.bias", h, 3, d, stored=(3 * h * d,)).unbind(1)
        o_bias = shaped(tensors, "dense.bias", dim) if "dense.bias" in tensors else None
        q, k, v = qkv.unbind(1)
        return Projections(q, k, v, o, biases[0], biases[1], biases[2], o_bias)

    def join(self, projections: Projections, geometry: Geometry) -> dict[str, Tensor]:
        p = projections
        tensors = {
            "query_key_value.weight": torch.stack((p.q, p.k, p.v), dim=1).flatten(0, 2),
            "dense.weight": p.o.flatten(1, 2).contiguous(),
        }
        if p.q_bias is not None and p.k_bias is not None and p.v_bias is not None:
            tensors["query_key_value.bias"] = torch.stack((p.q_bias, p.k_bias, p.v_bias), dim=1).flatten()
        if p.o_bias is not None:
            tensors["dense.bias"] = p.o_bias
        return tensors

    def _hold_kv_heads(self, config: Config, num_kv_heads: int) -> Config:
        raise Refusal(
            f"no stock GPT-NeoX class holds num_kv_heads={num_kv_heads}: it has as many KV heads as query heads. The "
            "Phi class could, with its norms folded into the weights (not offered); attnzoo.swap holds it in memory"
        )


FAMILIES = (GPTNeoX(),)
