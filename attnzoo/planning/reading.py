"""From a config.json dictionary to a model on paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnzoo.conversion.families import Config, ConversionError, Geometry, family_for, known
from attnzoo.conversion.families.base import stock_geometry, whole
from attnzoo.masks import Mask, SlidingWindow
from attnzoo.planning.attention import Attention, Latent, Softmax
from attnzoo.planning.model import Layer, Model
from attnzoo.planning.traits import Switch, Traits, traits_for
from attnzoo.planning.weights import Weights, experts, feed_forward, matrix, vectors

_PARTS = ("text_config", "llm_config", "language_config")
_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts")


def read_model(config: Mapping[str, Any]) -> Model:
    """The model that a config.json dictionary describes; of one in several parts, its language model.

    A type that is not among `known_types()` is read like Llama's, with a note.

    Raises:
        ConversionError (a ValueError): where a key is missing or odd, naming it, and for what is no causal language
            model with attention in every layer.
    """
    text, notes = _text_part(dict(config))
    model_type = str(text.get("model_type", "unknown"))
    if text.get("is_encoder_decoder"):
        raise ConversionError(f"config.json is of an encoder with a decoder ({model_type}); only decoders are planned")
    traits = traits_for(model_type)
    if traits is None:
        notes.append(f"model_type {model_type!r} is not known: it is read like llama, and its parameters are estimated")
        traits = Traits(window="every")
    if text.get("quantization_config"):
        notes.append("the config is of a quantised checkpoint; bytes are those of the dtype that was asked for")
    text = {**traits.defaults, **text}
    geometry = _geometry(text, model_type)
    dim, vocab = geometry.dim, whole(text, "vocab_size")
    layers = tuple(
        Layer(_attention(text, traits, geometry, mask), _rest(text, traits, dim, number))
        for number, mask in enumerate(_masks(text, traits, geometry.num_layers))
    )
    output = matrix(dim, vocab, bias=traits.head_bias)
    norm = vectors(traits.final_norm * traits.norm_vectors * dim)
    positions = _positions(text)
    looked_up = 0 if text.get("tie_word_embeddings", False) else vocab * dim
    if traits.positions:
        looked_up += whole(text, "n_positions", "max_position_embeddings") * dim
    return Model(model_type, dim, vocab, positions, layers, norm + output, looked_up, tuple(notes))


def _text_part(config: Config) -> tuple[Config, list[str]]:
    for name in _PARTS:
        part = config.get(name)
        if isinstance(part, Mapping):
            kind = config.get("model_type", "this model")
            # The output belongs to the whole model, so its own word on tying counts.
            tied = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
            return {"model_type": kind, **part, **tied}, [f"only the language model of {kind} is counted ({name})"]
    return config, []


def _geometry(config: Config, model_type: str) -> Geometry:
    if model_type in known():
        return family_for(model_type).geometry(config)
    if config.get("kv_lora_rank") is not None:
        config = {key: value for key, value in config.items() if key not in ("head_dim", "num_key_value_heads")}
    return stock_geometry(config)


def _attention(config: Config, traits: Traits, geometry: Geometry, mask: Mask | None) -> Attention:
    if config.get("kv_lora_rank") is not None:
        return Latent(
            geometry.num_heads,
            whole(config, "kv_lora_rank"),
            whole(config, "qk_nope_head_dim"),
            whole(config, "qk_rope_head_dim"),
            whole(config, "v_head_dim"),
            None if config.get("q_lora_rank") is None else whole(config, "q_lora_rank"),
            mask,
            bool(config.get("attention_bias", False)),
        )
    return Softmax(
        geometry.num_heads,
        geometry.num_kv_heads,
        geometry.head_dim,
        geometry.head_dim,
        mask,
        _on(config, traits.qkv_bias),
        _on(config, traits.out_bias),
        traits.qk_norm,
        traits.sinks,
    )


def _rest(config: Config, traits: Traits, dim: int, number: int) -> Weights:
    """MLP or experts of layer `number`, and its norms."""
    norms = vectors(traits.norms * traits.norm_vectors * dim)
    bias = _on(config, traits.mlp_bias)
    count = next((config[key] for key in _EXPERTS if config.get(key)), None)
    if count is None or _is_dense(config, number):
        hidden = whole(config, "intermediate_size", "n_inner", "ffn_dim", default=4 * dim if not traits.gated else None)
        return norms + feed_forward(dim, hidden, gated=traits.gated, bias=bias)
    count, chosen = whole(config, *_EXPERTS), whole(config, "num_experts_per_tok", "experts_per_token")
    if chosen > count:
        raise ConversionError(f"config.json has num_experts_per_tok {chosen}, more than its {count} experts")
    hidden = whole(config, "moe_intermediate_size", "intermediate_size")
    one = feed_forward(dim, hidden, gated=traits.gated, bias=bias or traits.expert_bias)
    routed = experts(one, count, chosen) + matrix(dim, count, bias=traits.expert_bias)
    return norms + routed + _shared(config, traits, dim, hidden)


def _shared(config: Config, traits: Traits, dim: int, hidden: int) -> Weights:
    """The experts that every token goes through."""
    wide = config.get("shared_expert_intermediate_size") or (config.get("n_shared_experts") or 0) * hidden
    if not wide:
        return Weights()
    gate = matrix(dim, 1) if traits.shared_gate else Weights()
    return feed_forward(dim, wide, gated=traits.gated) + gate


def _is_dense(config: Config, number: int) -> bool:
    """Whether a layer of a model with experts has none."""
    return (
        number < (config.get("first_k_dense_replace") or 0)
        or number in (config.get("mlp_only_layers") or ())
        or (number + 1) % (config.get("decoder_sparse_step") or 1) != 0
    )


def _masks(config: Config, traits: Traits, layers: int) -> list[Mask | None]:
    """One a layer; None is causal."""
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        slides = [False] * layers
    elif config.get("layer_types"):
        slides = [kind == "sliding_attention" for kind in _layer_types(config, layers)]
    elif traits.window == "pattern":
        pattern = whole(config, "sliding_window_pattern")
        slides = [(number + 1) % pattern != 0 for number in range(layers)]
    elif traits.window == "late":
        first = config["max_window_layers"]
        slides = [number >= first for number in range(layers)]
    else:
        slides = [traits.window == "every"] * layers
    _layer_types(config, layers)
    return [SlidingWindow(whole(config, "sliding_window")) if slide else None for slide in slides]


def _layer_types(config: Config, layers: int) -> list[str]:
    types = config.get("layer_types") or []
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ConversionError(
                f"config.json has a layer of type {kind!r}; planned are full_attention and sliding_attention"
            )
    if types and len(types) != layers:
        raise ConversionError(f"config.json has {len(types)} layer_types for its {layers} layers")
    return list(types)


def _positions(config: Config) -> int | None:
    found = config.get("max_position_embeddings") or config.get("n_positions")
    return found if isinstance(found, int) else None


def _on(config: Config, switch: Switch) -> bool:
    return bool(config.get(switch, False)) if isinstance(switch, str) else switch
