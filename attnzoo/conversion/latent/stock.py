"""Latent attention as transformers' own `deepseek_v3` holds it, every layer dense: no code beside the weights.

The class differs from what a converted layer needs, and each difference is taken up by the weights:

- It normalises the latent: c / sqrt(mean(c^2) + eps) * gamma, eps = 1e-6. Scaled down far below sqrt(eps), the latent
  does not move the root any more, and gamma scales it up again: nothing is left of the norm, in fp32 and in bf16. Both
  scales are powers of two, so that they round nothing; what they miss of sqrt(eps) goes into the projection behind.
- It scales scores by (nope + rope) ** -0.5: the rest goes into the queries.
- It takes rope dimensions in neighbouring pairs: rows are reordered.
- Its queries have no bias. Those of a model that has one go through a latent as wide as the inputs, with a 1 behind
  them, past the norm in the same way.
- It rotates by the config's frequencies: a subset of the model's own is written as factors of `longrope`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.conversion.errors import Refusal
from attnzoo.conversion.families import Config, Geometry
from attnzoo.conversion.latent.factor import LatentWeights
from attnzoo.masks import Causal
from attnzoo.specs import MLA

HELD = ("llama", "mistral", "qwen2", "qwen3")
_SMALL, _GAMMA = 2.0**-30, 2.0**20
_MISSING = math.sqrt(1e-6) / (_SMALL * _GAMMA)
_SAME = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id"),
    *("eos_token_id", "tie_word_embeddings", "attention_dropout", "dtype", "torch_dtype", "transformers_version"),
}


def check_held(config: Config, specs: Sequence[MLA]) -> None:
    """Refusal where a model of this config with latent attention is not a dense deepseek_v3."""
    family = config.get("model_type")
    kinds = config.get("layer_types") or ()
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    why = None
    if family not in HELD:
        why = f"of {', '.join(HELD)} it has the norms and the MLP, of {family} it has not"
    elif config.get("mlp_bias"):
        why = "its MLP has no biases"
    elif "sliding_attention" in kinds or (not kinds and window is not None):
        why = "it has no sliding window"
    elif any(spec.mask not in (None, Causal()) for spec in specs):
        why = "it has the causal mask only"
    elif any(spec != specs[0] for spec in specs):
        why = "its layers are alike"
    elif specs[0].q_lora_rank is not None:
        why = "queries of a low rank are normalised in it"
    if why:
        raise Refusal(
            f"transformers' deepseek_v3 holds no such model: {why}. In memory attnzoo.swap and attnzoo.convert without "
            "out hold it, and attnzoo.hf.export writes it with its code"
        )


def stock_config(config: Config, spec: MLA, rope: Mapping[str, Any], biases: bool, query_bias: bool) -> Config:
    """The config.json of the result.

    Args:
        config: the source's.
        spec: with all sizes.
        rope: the new `rope_parameters`, see `rope_parameters`.
        biases: whether keys, values, outputs or queries have one.
        query_bias: whether queries have one.
    """
    new = {key: value for key, value in config.items() if key in _SAME}
    return new | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_key_value_heads": config["num_attention_heads"],
        "first_k_dense_replace": config["num_hidden_layers"],
        "num_nextn_predict_layers": 0,
        "kv_lora_rank": spec.kv_lora_rank,
        "q_lora_rank": config["hidden_size"] + 1 if query_bias else None,
        "qk_nope_head_dim": spec.qk_nope_head_dim,
        "qk_rope_head_dim": spec.qk_rope_head_dim,
        "v_head_dim": spec.v_head_dim,
        "attention_bias": biases,
        "rope_interleave": True,
        "rope_parameters": dict(rope),
    }


def rope_parameters(
    source: Mapping[str, Any], frequencies: Tensor, planes: Sequence[int], factor: float, reach: int
) -> dict[str, Any]:
    """What makes a stock class rotate by the frequencies of `planes`.

    Args:
        source: the model's own `rope_parameters`.
        frequencies: `[F]` of the model, fp32.
        planes: the frequency of each rope plane.
        factor: what the model's cosines and sines are multiplied by.
        reach: the model's `max_position_embeddings`.

    Raises:
        Refusal: for other planes than all of them once, where frequencies change with the length of the text.
    """
    if list(planes) == list(range(len(frequencies))):
        return {key: value for key, value in source.items() if key != "partial_rotary_factor"}
    if source.get("rope_type", "default") in ("dynamic", "longrope"):
        raise Refusal(
            f"the frequencies of rope_type {source['rope_type']!r} change with the text's length, so the rope part "
            f"has to keep all of them once, with qk_rope_head_dim={2 * len(frequencies)}; got {list(planes)}"
        )
    theta = float(source["rope_theta"])
    wanted = frequencies.float().cpu()[list(planes)]
    powers = theta ** (torch.arange(0, 2 * len(wanted), 2, dtype=torch.int64).float() / (2 * len(wanted)))
    # The class computes 1 / (factor * power) in fp32; a neighbour of the plain quotient may come nearer.
    best = 1.0 / (wanted * powers)
    for direction in (math.inf, -math.inf):
        near = torch.nextafter(1.0 / (wanted * powers), torch.tensor(direction))
        closer = (1.0 / (near * powers) - wanted).abs() < (1.0 / (best * powers) - wanted).abs()
        best = torch.where(closer, near, best)
    factors = best.tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": factor,
        "original_max_position_embeddings": reach,
    }


def stock_tensors(w: LatentWeights, geometry: Geometry, spec: MLA, scale: float, biases: bool) -> dict[str, Tensor]:
    """One layer's tensors by their names inside the attention, in the dtype of `w`; differentiable.

    Args:
        w: without a queries' latent.
        geometry: of the model.
        spec: with all sizes.
        scale: of the scores.
        biases: whether the class is made with `attention_bias`.
    """
    assert spec.kv_lora_rank and spec.qk_nope_head_dim and spec.qk_rope_head_dim and w.q_down is None
    rank, nope, rope = spec.kv_lora_rank, spec.qk_nope_head_dim, spec.qk_rope_head_dim
    pairs = torch.arange(rope, device=w.q.device).view(2, -1).T.flatten()  # halves to neighbours
    order = torch.cat([torch.arange(nope, device=w.q.device), nope + pairs])
    down_order = torch.cat([torch.arange(rank, device=w.q.device), rank + pairs])
    stretch = scale * math.sqrt(nope + rope)

    q = stretch * w.q.unflatten(0, (geometry.num_heads, nope + rope))[:, order].flatten(0, 1)
    shrink = torch.cat([w.q.new_full((rank,), _SMALL), w.q.new_ones(rope)])
    tensors = {
        "kv_a_proj_with_mqa.weight": shrink[:, None] * w.kv_down[down_order],
        "kv_a_layernorm.weight": w.q.new_full((rank,), _GAMMA),
        "kv_b_proj.weight": _MISSING * w.kv_up,
        "o_proj.weight": w.o,
    }
    if w.q_bias is None:
        tensors["q_proj.weight"] = q
    else:
        bias = stretch * w.q_bias.unflatten(0, (geometry.num_heads, nope + rope))[:, order].flatten()
        eye = torch.eye(geometry.dim + 1, dtype=q.dtype, device=q.device)
        tensors |= {
            "q_a_proj.weight": _SMALL * eye[:, :-1],
            "q_a_proj.bias": _SMALL * eye[:, -1],
            "q_a_layernorm.weight": q.new_full((geometry.dim + 1,), _GAMMA),
            "q_b_proj.weight": _MISSING * torch.cat([q, bias[:, None]], dim=1),
        }
    if biases:
        down_bias = w.q.new_zeros(rank + rope) if w.kv_down_bias is None else w.kv_down_bias
        tensors["kv_a_proj_with_mqa.bias"] = shrink * down_bias[down_order]
        tensors["o_proj.bias"] = w.q.new_zeros(geometry.dim) if w.o_bias is None else w.o_bias
    return tensors
