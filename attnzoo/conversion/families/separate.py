"""Families with q, k, v and o in linear layers of their own: Llama and its relatives, and Phi."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from attnzoo.conversion.errors import ConversionError, Refusal
from attnzoo.conversion.families.base import Config, Family, Geometry, Projections, shaped, stock_geometry

Window = Literal["every_layer", "layer_types", "bound_to_rope"]


class Separate(Family):
    """`q_proj k_proj v_proj` and an output, `[out, in]` each, biases and per-head RMS norms where the model has them.

    `kv_heads` and `head_dim` are what the config class takes for absent keys, `window` how it spells sliding windows.
    """

    def __init__(
        self,
        model_type: str,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        norms: bool = False,
        window: Window | None = None,
        output: str = "o_proj",
        final_norm: str = "norm.weight",
        rotated: float = 1.0,
    ) -> None:
        self.model_type = model_type
        self.rotated = rotated
        self.output = output
        self._kv_heads, self._head_dim, self._window = kv_heads, head_dim, window
        self.outside = ("embed_tokens.weight", final_norm)
        layers = ("q_proj", "k_proj", "v_proj", output)
        self.norms = ("q_norm.weight", "k_norm.weight") if norms else ()
        self.required = (*(f"{layer}.weight" for layer in layers), *self.norms)
        self.optional = tuple(f"{layer}.bias" for layer in layers)

    def geometry(self, config: Config) -> Geometry:
        if config.get("qk_layernorm"):
            raise ConversionError(f"{self.model_type} with qk_layernorm=true is not supported; only without it")
        return stock_geometry(config, self._kv_heads, self._head_dim)

    def split(self, tensors: Mapping[str, Tensor], geometry: Geometry) -> Projections:
        self.check_names(tensors)
        dim, d = geometry.dim, geometry.head_dim
        parts = {}
        for part, heads in (("q", geometry.num_heads), ("k", geometry.num_kv_heads), ("v", geometry.num_kv_heads)):
            parts[part] = shaped(tensors, f"{part}_proj.weight", heads, d, dim)
            if f"{part}_proj.bias" in tensors:
                parts[f"{part}_bias"] = shaped(tensors, f"{part}_proj.bias", heads, d)
        o = f"{self.output}.weight"
        parts["o"] = shaped(tensors, o, dim, geometry.num_heads, d, stored=(dim, geometry.num_heads * d))
        if f"{self.output}.bias" in tensors:
            parts["o_bias"] = shaped(tensors, f"{self.output}.bias", dim)
        for norm in self.norms:
            parts[norm.removesuffix(".weight")] = shaped(tensors, norm, d)
        return Projections(**parts)

    def join(self, projections: Projections, geometry: Geometry) -> dict[str, Tensor]:
        p = projections
        tensors = {f"{part}_proj.weight": getattr(p, part).flatten(0, 1).contiguous() for part in "qkv"}
        tensors |= {f"{self.output}.weight": p.o.flatten(1, 2).contiguous()}
        for part in "qkv":
            if (bias := getattr(p, f"{part}_bias")) is not None:
                tensors[f"{part}_proj.bias"] = bias.flatten().contiguous()
        if p.o_bias is not None:
            tensors[f"{self.output}.bias"] = p.o_bias
        for norm in self.norms:
            tensors[norm] = getattr(p, norm.removesuffix(".weight"))
        return tensors

    def _hold_kv_heads(self, config: Config, num_kv_heads: int) -> Config:
        return config | {"num_key_value_heads": num_kv_heads}

    def _hold_window(self, config: Config, window: int | None) -> Config:
        if self._window is None:
            return super()._hold_window(config, window)
        if self._window == "bound_to_rope":
            raise Refusal(
                f"{self.model_type} rotates its sliding and its full layers with different bases, so a new mask would "
                "change more than the mask; attnzoo.swap holds it in memory"
            )
        if self._window == "every_layer":
            return config | {"sliding_window": window}
        kind = "full_attention" if window is None else "sliding_attention"
        config["layer_types"] = [kind] * self.geometry(config).num_layers
        if window is not None:
            config["sliding_window"] = window
        if self.model_type.startswith("qwen"):
            config |= {"use_sliding_window": window is not None, "max_window_layers": 0}
        return config


FAMILIES = (
    Separate("llama"),
    Separate("mistral", kv_heads=8, window="every_layer"),
    Separate("qwen2", kv_heads=32, window="layer_types"),
    Separate("qwen3", kv_heads=32, head_dim=128, norms=True, window="layer_types"),
    Separate("gemma", kv_heads=16, head_dim=256),
    Separate("gemma2", kv_heads=4, head_dim=256, window="layer_types"),
    Separate("gemma3_text", kv_heads=4, head_dim=256, norms=True, window="bound_to_rope"),
    Separate("phi", output="dense", final_norm="final_layernorm.weight", rotated=0.5),
)
