"""Families with q, k, v and o in linear layers of their own: Llama and its relatives, and Phi."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from attnzoo.conversion.errors import ConversionError, Refusal
from attnzoo.conversion.families.base import Config, Family, Geometry, Projections, shaped, stock_geometry, whole
from attnzoo.conversion.rotary import Layout, Rotary

Window = Literal["every_layer", "layer_types", "bound_to_rope"]
Norms = Literal["one", "each", "joint"]


class Separate(Family):
    """`q_proj k_proj v_proj` and an output, `[out, in]` each, biases and norms of q and k where the model has them.

    `kv_heads` and `head_dim` are what the config class takes for absent keys. `norms`: one norm for all heads, one for
    each, or one over the channels of all heads together; `always` whether every model has them. `window` is how the
    config spells sliding windows, `switch` whether it has a `use_sliding_window` besides. `unrotated` names the
    layers without RoPE: a config key with a list, its value for them, and the key of their interval where it is absent.
    """

    def __init__(
        self,
        model_type: str,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        norms: Norms | None = None,
        norm_offset: float = 0.0,
        always: bool = True,
        window: Window | None = None,
        switch: bool = False,
        projection: str = "{part}_proj",
        output: str = "o_proj",
        final_norm: str | None = "norm.weight",
        rope: Layout | None = "half",
        rotated: float = 1.0,
        unrotated: tuple[str, object, str] | None = None,
        varied: tuple[str, ...] = (),
    ) -> None:
        self.model_type = model_type
        self.rope, self.rotated, self._unrotated = rope, rotated, unrotated
        self.output, self.varied = output, varied
        self._kv_heads, self._head_dim, self._window, self._switch = kv_heads, head_dim, window, switch
        self.outside = tuple(filter(None, ("embed_tokens.weight", final_norm)))
        self.projections = {part: projection.format(part=part) for part in "qkv"}
        layers = (*self.projections.values(), output)
        self.norms, self.joint_norm, self.norm_offset = norms, norms == "joint", norm_offset
        self.centred_norm = norms == "each"
        names = ("q_norm.weight", "k_norm.weight") if norms else ()
        self.required = (*(f"{layer}.weight" for layer in layers), *(names if always else ()))
        self.optional = (*(f"{layer}.bias" for layer in layers), *(() if always else names))

    def rotary(self, config: Config, layer: int) -> Rotary:
        if self._unrotated is not None:
            key, value, interval = self._unrotated
            kinds = config.get(key)
            bare = kinds[layer] == value if kinds else (layer + 1) % whole(config, interval, default=4) == 0
            if bare:
                return Rotary()
        return super().rotary(config, layer)

    def geometry(self, config: Config) -> Geometry:
        if config.get("qk_layernorm"):
            raise ConversionError(f"{self.model_type} with qk_layernorm=true is not supported; only without it")
        return stock_geometry(config, self._kv_heads, self._head_dim)

    def split(self, tensors: Mapping[str, Tensor], geometry: Geometry) -> Projections:
        self.check_names(tensors)
        dim, d = geometry.dim, geometry.head_dim
        parts = {}
        for part, heads in (("q", geometry.num_heads), ("k", geometry.num_kv_heads), ("v", geometry.num_kv_heads)):
            name = self.projections[part]
            parts[part] = shaped(tensors, f"{name}.weight", heads, d, dim)
            if f"{name}.bias" in tensors:
                parts[f"{part}_bias"] = shaped(tensors, f"{name}.bias", heads, d)
        o = f"{self.output}.weight"
        parts["o"] = shaped(tensors, o, dim, geometry.num_heads, d, stored=(dim, geometry.num_heads * d))
        if f"{self.output}.bias" in tensors:
            parts["o_bias"] = shaped(tensors, f"{self.output}.bias", dim)
        for part, heads in (("q", geometry.num_heads), ("k", geometry.num_kv_heads)):
            name = f"{part}_norm.weight"
            if name in tensors:
                sizes = (d,) if self.norms == "one" else (heads, d)
                stored = sizes if self.norms == "each" else None
                parts[f"{part}_norm"] = shaped(tensors, name, *sizes, stored=stored)
        return Projections(**parts)

    def join(self, projections: Projections, geometry: Geometry) -> dict[str, Tensor]:
        p = projections
        names = self.projections.items()
        tensors = {f"{name}.weight": getattr(p, part).flatten(0, 1).contiguous() for part, name in names}
        tensors |= {f"{self.output}.weight": p.o.flatten(1, 2).contiguous()}
        for part, name in names:
            if (bias := getattr(p, f"{part}_bias")) is not None:
                tensors[f"{name}.bias"] = bias.flatten().contiguous()
        if p.o_bias is not None:
            tensors[f"{self.output}.bias"] = p.o_bias
        for part in ("q_norm", "k_norm"):
            if (norm := getattr(p, part)) is not None:
                tensors[f"{part}.weight"] = norm.flatten().contiguous() if self.joint_norm else norm
        return tensors

    def _hold_kv_heads(self, config: Config, num_kv_heads: int) -> Config:
        return config | {"num_key_value_heads": num_kv_heads}

    def _hold_window(self, config: Config, window: int | None) -> Config:
        if self._window is None:
            return super()._hold_window(config, window)
        if self._window == "bound_to_rope":
            raise Refusal(
                f"{self.model_type} does not rotate its sliding and its full layers alike, so a new mask would change "
                "more than the mask; attnzoo.swap holds it in memory"
            )
        if self._switch:
            config |= {"use_sliding_window": window is not None, "max_window_layers": 0}
        if self._window == "every_layer":
            return config | {"sliding_window": window}
        kind = "full_attention" if window is None else "sliding_attention"
        config["layer_types"] = [kind] * self.geometry(config).num_layers
        if window is not None:
            config["sliding_window"] = window
        return config


FAMILIES = (
    Separate("llama"),
    Separate("mistral", kv_heads=8, window="every_layer"),
    Separate("ministral", kv_heads=8, window="layer_types"),
    Separate("mixtral", kv_heads=8, window="every_layer"),
    Separate("qwen2", kv_heads=32, window="layer_types", switch=True),
    Separate("qwen3", kv_heads=32, head_dim=128, norms="one", window="layer_types", switch=True),
    # A layer has experts or one MLP.
    Separate("qwen2_moe", kv_heads=16, window="layer_types", switch=True, varied=("mlp.",)),
    Separate("qwen3_moe", kv_heads=4, norms="one", window="every_layer", switch=True, varied=("mlp.",)),
    Separate("gemma", kv_heads=16, head_dim=256),
    Separate("gemma2", kv_heads=4, head_dim=256, window="layer_types"),
    Separate("gemma3_text", kv_heads=4, head_dim=256, norms="one", norm_offset=1.0, window="bound_to_rope"),
    Separate("phi", output="dense", final_norm="final_layernorm.weight", rotated=0.5),
    Separate("granite"),
    Separate("starcoder2", kv_heads=2, window="every_layer"),
    Separate("nemotron", rotated=0.5),
    Separate(
        "smollm3",
        kv_heads=4,
        window="layer_types",
        switch=True,
        unrotated=("no_rope_layers", 0, "no_rope_layer_interval"),
    ),
    Separate("olmo", final_norm=None),  # its norms have no weights
    Separate("olmo2", norms="joint"),
    Separate("olmo3", norms="joint", window="bound_to_rope"),
    Separate("cohere", norms="each", always=False, rope="interleaved"),
    Separate(
        "cohere2",
        window="bound_to_rope",
        rope="interleaved",
        unrotated=("layer_types", "full_attention", "sliding_window_pattern"),
    ),
)
