"""What the class of a model type has that its config.json does not say. To add a type: its line in `_TRAITS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Switch = bool | str  # a string: the config's key that says it


@dataclass(frozen=True)
class Traits:
    """What is not said by a config.

    Attributes:
        norms: norms of width dim in a layer; final_norm: whether one comes before the output.
        norm_vectors: 1 for RMSNorm, 2 for LayerNorm with a bias, 0 for one without parameters.
        qkv_bias, out_bias, mlp_bias, head_bias: what has biases.
        qk_norm: norms of queries and keys, of each head or of the whole width.
        gated: the MLP has a gate.
        positions: there is a table of them.
        sinks: a learned number for each head in the softmax.
        expert_bias: experts and router have biases; shared_gate: the shared expert has a gate.
        window: which layers a `sliding_window` is for, where `layer_types` does not say: none, every one, those from
            `max_window_layers` on, or all but each `sliding_window_pattern`-th.
        defaults: what absent keys mean.
    """

    norms: int = 2
    final_norm: bool = True
    norm_vectors: Literal[0, 1, 2] = 1
    qkv_bias: Switch = "attention_bias"
    out_bias: Switch = "attention_bias"
    mlp_bias: Switch = "mlp_bias"
    head_bias: bool = False
    qk_norm: Literal["head", "width"] | None = None
    gated: bool = True
    positions: bool = False
    sinks: bool = False
    expert_bias: bool = False
    shared_gate: bool = False
    window: Literal["every", "late", "pattern"] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


_LLAMA = Traits()
_PLAIN = Traits(qkv_bias=False, out_bias=False, mlp_bias=False)
_LATE = {"use_sliding_window": False, "max_window_layers": 28}
_QWEN2 = Traits(qkv_bias=True, out_bias=False, mlp_bias=False, window="late", defaults=_LATE)
_QWEN3 = replace(_LLAMA, qk_norm="head", mlp_bias=False, window="late", defaults=_LATE)
_GEMMA = Traits(mlp_bias=False, defaults={"tie_word_embeddings": True})
_GEMMA2 = replace(
    _GEMMA,
    norms=4,
    window="pattern",
    defaults={"tie_word_embeddings": True, "sliding_window": 4096, "sliding_window_pattern": 2},
)
_GEMMA3 = replace(
    _GEMMA2,
    qk_norm="head",
    defaults={
        "tie_word_embeddings": True,
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
)
_GPT = Traits(norm_vectors=2, qkv_bias=True, out_bias=True, mlp_bias=True, gated=False)
_GPT2 = replace(_GPT, positions=True, defaults={"tie_word_embeddings": True})

_TRAITS: dict[str, Traits] = {
    "llama": _LLAMA,
    "granite": _LLAMA,
    "smollm3": replace(_LLAMA, defaults={"tie_word_embeddings": True}),
    "olmo": replace(_LLAMA, mlp_bias=False, norm_vectors=0),
    "olmo2": replace(_LLAMA, mlp_bias=False, qk_norm="width"),
    "mistral": replace(_PLAIN, window="every", defaults={"sliding_window": 4096}),
    "ministral": replace(_PLAIN, window="every"),
    "mixtral": replace(_PLAIN, window="every", defaults={"num_key_value_heads": 8}),
    "phi3": replace(_PLAIN, window="every"),
    "qwen2": _QWEN2,
    "qwen2_moe": replace(_QWEN2, qkv_bias="qkv_bias", shared_gate=True, defaults={**_LATE, "qkv_bias": True}),
    "qwen3": _QWEN3,
    "qwen3_moe": replace(_QWEN3, window="every"),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "phi": replace(_GPT, norms=1, head_bias=True),
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neox": replace(_GPT, qkv_bias="attention_bias", out_bias="attention_bias", defaults={"attention_bias": True}),
    "starcoder2": replace(
        _GPT,
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        window="every",
        defaults={"use_bias": True, "tie_word_embeddings": True},
    ),
    "gpt_oss": replace(
        _LLAMA,
        sinks=True,
        expert_bias=True,
        window="pattern",
        defaults={"attention_bias": True, "sliding_window": 128, "sliding_window_pattern": 2},
    ),
    "deepseek_v2": _PLAIN,
    "deepseek_v3": _PLAIN,
    "kimi_k2": _PLAIN,
    "minicpm3": replace(_PLAIN, defaults={"tie_word_embeddings": True}),
}
# The language model inside a model with images or sound.
_ALIASES = {
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "gemma3": "gemma3_text",
}


def known_types() -> list[str]:
    """The model types whose parameters are counted to the last one, sorted."""
    return sorted({*_TRAITS, *_ALIASES})


def traits_for(model_type: str) -> Traits | None:
    """The traits of a config's `model_type`; None for one that is not known."""
    return _TRAITS.get(_ALIASES.get(model_type, model_type))
