"""A model with latent attention as transformers' own DeepseekV3: what serves it needs no attnzoo."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, DeepseekV3ForCausalLM, PreTrainedModel

from attnzoo.conversion import Refusal
from attnzoo.conversion.families import Config, Geometry, family_for
from attnzoo.conversion.latent import LatentWeights
from attnzoo.conversion.latent.stock import check_held, rope_parameters, stock_config, stock_tensors
from attnzoo.hf.auto import stock_type
from attnzoo.hf.latent import SwappedLatentAttention
from attnzoo.specs import MLA


def as_deepseek(model: PreTrainedModel) -> DeepseekV3ForCausalLM:
    """The same function as a stock DeepseekV3 model, every layer dense; `model` stays as it is.

    Logits differ by rounding alone. Its `save_pretrained` writes a folder that plain transformers loads. It is for
    use, not for training: its latents are scaled down far below what optimizers work with. Train the model that it is
    made from.

    Args:
        model: a causal language model of `attnzoo.conversion.latent.stock.HELD`'s families whose layers `attnzoo.swap`
            or `attnzoo.convert` made latent, all with the same sizes.

    Raises:
        ValueError: for a model without latent attention; Refusal for one that the class does not hold.
    """
    layers = [module for module in model.modules() if isinstance(module, SwappedLatentAttention)]
    if not layers:
        raise ValueError(f"model must have latent attention, as attnzoo.convert makes it; got {type(model).__name__}")
    config = model.config.to_dict() | {"model_type": stock_type(str(model.config.model_type))}
    family = family_for(config["model_type"])
    geometry = family.geometry(config)
    if len(layers) != geometry.num_layers or not type(model).__name__.endswith("ForCausalLM"):
        raise Refusal(
            f"transformers' deepseek_v3 holds a causal language model with latent attention in every layer; "
            f"{type(model).__name__} has it in {len(layers)} of {geometry.num_layers}"
        )
    check_held(config, [layer.spec for layer in layers])
    weights = [LatentWeights.of(dict(layer.named_parameters())) for layer in layers]
    biases = Biases.of(weights)
    new_config = deepseek_config(model, config, layers[0].spec, biases)
    held = {name for name, _ in model.named_parameters()}
    state: dict[str, Tensor] = {}
    for number, (layer, w) in enumerate(zip(layers, weights, strict=True)):
        stem = family.attention_path(number) + "."
        held -= {stem + name for name, _ in layer.named_parameters()}
        made = deepseek_tensors(w, geometry, layer.spec, layer.scale, biases, model.dtype)
        state |= {stem + name: tensor for name, tensor in made.items()}
    parameters = dict(model.named_parameters())
    state |= {name: parameters[name].detach().clone() for name in held}
    new: DeepseekV3ForCausalLM = DeepseekV3ForCausalLM.from_pretrained(
        None, config=AutoConfig.for_model(**new_config), state_dict=state, dtype=model.dtype
    )
    new.to(model.device)  # type: ignore[arg-type]
    new.train(model.training)
    new.generation_config = copy.deepcopy(model.generation_config)
    return new


class Biases:
    """Which biases the layers of a model have: any at all, and queries'."""

    def __init__(self, any_at_all: bool, queries: bool) -> None:
        self.any, self.queries = any_at_all, queries

    @classmethod
    def of(cls, weights: list[LatentWeights]) -> Biases:
        queries = any(w.q_bias is not None for w in weights)
        return cls(queries or any(w.kv_down_bias is not None or w.o_bias is not None for w in weights), queries)


def deepseek_config(model: nn.Module, config: Config, spec: MLA, biases: Biases) -> dict[str, Any]:
    """The stock config; `model` has the source's tables of frequencies."""
    tables = {name.rpartition(".")[2]: table for name, table in model.named_buffers() if name.endswith("inv_freq")}
    factor = next((m.attention_scaling for m in model.modules() if hasattr(m, "attention_scaling")), 1.0)
    rope = rope_parameters(
        config.get("rope_parameters") or {},
        next(iter(tables.values())),
        spec.rope_frequencies or (),
        float(factor),  # type: ignore[arg-type]
        config["max_position_embeddings"],
    )
    return stock_config(config, spec, rope, biases.any, biases.queries)


@torch.no_grad()
def deepseek_tensors(
    w: LatentWeights, geometry: Geometry, spec: MLA, scale: float, biases: Biases, dtype: torch.dtype
) -> dict[str, Tensor]:
    """One layer's stock tensors; computed in fp32 or wider, so that they are rounded once."""
    if dtype == torch.float16:
        raise Refusal("deepseek_v3's latents would underflow in float16; convert the model to bfloat16 or float32")
    wide = LatentWeights.of({name: t.to(torch.promote_types(t.dtype, torch.float32)) for name, t in w.named().items()})
    made = stock_tensors(wide, geometry, spec, scale, biases.any)
    return {name: tensor.to(dtype).contiguous() for name, tensor in made.items()}
