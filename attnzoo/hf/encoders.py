"""BERT's family of encoders, as `attnzoo.conversion.families` describes decoders: where they keep q, k and v.

What follows attention, the output projection with its dropout, residual and norm, stands outside of the layer that is
swapped and is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from attnzoo.conversion.errors import ConversionError, Refusal
from attnzoo.conversion.families import Family, Geometry, Projections
from attnzoo.conversion.families.base import Config, shaped, stock_geometry
from attnzoo.hf.weights import no_outputs
from attnzoo.masks import Full, Mask


class Encoder(Family):
    """`query key value`, `[out, in]` each with a bias; attention in both directions.

    `base` is the path of the base model inside the classes with a head.
    """

    attention = "encoder.layer.{layer}.attention.self"
    required = ("query.weight", "key.weight", "value.weight")
    optional = ("query.bias", "key.bias", "value.bias")
    outputs = False

    def __init__(self, model_type: str, base: str) -> None:
        self.model_type, self.base = model_type, base

    def geometry(self, config: Config) -> Geometry:
        if config.get("is_decoder") or config.get("add_cross_attention"):
            raise ConversionError(f"{self.model_type} is known as an encoder only: is_decoder or add_cross_attention")
        ignored = ("num_key_value_heads", "head_dim")
        return stock_geometry({key: value for key, value in config.items() if key not in ignored})

    def split(self, tensors: Mapping[str, Tensor], geometry: Geometry) -> Projections:
        self.check_names(tensors)
        parts: dict[str, Tensor] = {}
        for name, part, heads in (
            ("query", "q", geometry.num_heads),
            ("key", "k", geometry.num_kv_heads),
            ("value", "v", geometry.num_kv_heads),
        ):
            parts[part] = shaped(tensors, f"{name}.weight", heads, geometry.head_dim, geometry.dim)
            if f"{name}.bias" in tensors:
                parts[f"{part}_bias"] = shaped(tensors, f"{name}.bias", heads, geometry.head_dim)
        return Projections(**parts, o=no_outputs(geometry))

    def join(self, projections: Projections, geometry: Geometry) -> dict[str, Tensor]:
        tensors = {}
        for name, part in (("query", "q"), ("key", "k"), ("value", "v")):
            tensors[f"{name}.weight"] = getattr(projections, part).flatten(0, 1).contiguous()
            bias = getattr(projections, f"{part}_bias")
            if bias is not None:
                tensors[f"{name}.bias"] = bias.flatten().contiguous()
        return tensors

    def with_mask(self, config: Config, mask: Mask) -> Config:
        if isinstance(mask, Full):
            return dict(config)
        raise Refusal(f"no stock {self.model_type} config holds mask={mask}; attnzoo.swap holds it in memory")

    def _hold_kv_heads(self, config: Config, num_kv_heads: int) -> Config:
        raise Refusal(
            f"no stock {self.model_type} class holds num_kv_heads={num_kv_heads}: it has as many KV heads as query "
            "heads; attnzoo.swap holds it in memory"
        )


ENCODERS = {
    family.model_type: family
    for family in (
        Encoder("bert", "bert."),
        Encoder("roberta", "roberta."),
        Encoder("xlm-roberta", "roberta."),
        Encoder("electra", "electra."),
    )
}
