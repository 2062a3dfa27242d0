"""`attnzoo.swap`: another attention mechanism inside a model, in place, with its weights carried over."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from attnzoo.conversion import UnknownFamily, merge_heads
from attnzoo.conversion.families import Family, Geometry, family_for
from attnzoo.conversion.families import known as known_families
from attnzoo.hf.auto import hold, release, stock_type
from attnzoo.hf.encoders import ENCODERS
from attnzoo.hf.latent import SwappedLatentAttention
from attnzoo.hf.latent_weights import rope_of
from attnzoo.hf.layers import SwappedAttention
from attnzoo.hf.linear import SwappedLinearAttention
from attnzoo.hf.plan import Plan, heads_of, make_plan, one_a_layer
from attnzoo.hf.torch_modules import has_torch_attention, swap_torch
from attnzoo.hf.weights import split_projections
from attnzoo.specs import MLA, Linear, Spec

Model = TypeVar("Model", bound=nn.Module)

# Their layers are called in a way of their own, or do more than the layer that would take their place.
_CONVERT_ONLY = frozenset(
    {"bloom", "cohere", "cohere2", "falcon", "gpt_bigcode", "gptj", "olmo", "olmo2", "olmo3", "opt", "smollm3", "t5"}
    | {"bloom_gqa", "gpt2_gqa", "opt_gqa", "t5_gqa"}
)


def swap(model: Model, spec: Spec | Sequence[Spec]) -> Model:
    """Replace the attention layers of a model, in place.

    Weights are carried over. GQA: KV heads are merged to their group's mean (arXiv 2305.13245) and everything else is
    kept, so a spec that changes nothing changes no output. Linear: the same, and a new feature map (2006.16236). MLA:
    heads are factored (2405.04434; see `attnzoo.hf.latent_weights`), which with RoPE is an approximation that has to be
    trained. Device, dtype, training mode and `requires_grad` are kept too. A transformers model's attn_implementation
    becomes "attnzoo"; its caches hold what its layers need.

    Where the stock family can hold the result, the model's config and `state_dict` say it in the family's own terms,
    and `save_pretrained` writes a checkpoint that loads without attnzoo. Where it cannot, a warning says so; then the
    model and its config become subclasses of theirs with the model type "attnzoo_" + the family's, which
    `AutoModelForCausalLM.from_pretrained` loads after `import attnzoo.hf`, and `attnzoo.hf.export` writes a folder that
    loads without attnzoo.

    Args:
        model: a Llama, Mistral, Mixtral, Qwen2, Qwen3 (with experts or without), Gemma, Gemma2, Gemma3 (text), Phi,
            Phi-3, Granite, Nemotron, StableLM, Starcoder2, GPT-2 or GPT-NeoX model; an encoder of BERT's family; or any
            module with `torch.nn.MultiheadAttention` in it, see `TorchAttention`.
        spec: one for all layers, or a list of one a layer (`attnzoo.hf.every`). `num_kv_heads` has to divide the
            layer's KV heads; `mask` takes the place of the layer's own, and a language model's stays causal whatever it
            says.

    Returns:
        `model`; a new module if it is a `torch.nn.MultiheadAttention` itself.

    Raises:
        ValueError: for another kind of model or spec, heads that do not divide, or a list of another length. Nothing is
            changed then.
    """
    if not isinstance(model, PreTrainedModel) and has_torch_attention(model):
        return swap_torch(model, spec)
    family, paths = _family(model)
    live: PreTrainedConfig = model.config  # type: ignore[assignment]
    config = live.to_dict() | {"model_type": family.model_type}
    geometry = family.geometry(config)
    specs = one_a_layer(spec, geometry.num_layers)
    old = [model.get_submodule(paths(layer)) for layer in range(geometry.num_layers)]
    rotary_dim = rotated(model)
    plan = make_plan(family, config, specs, old, rotary_dim)
    new = [_layer(layer, number, geometry, family, plan, model) for number, layer in enumerate(old)]

    for number, layer in enumerate(new):
        _put(model, paths(number), layer, plan, number)
    for key, value in plan.config.items():
        if key not in config or config[key] != value:
            setattr(live, key, value)
    if not plan.refusal and isinstance((config.get("attnzoo") or {}).get("spec"), list):
        del live.attnzoo  # an earlier swap's, which no longer holds
    for module in model.modules():
        if hasattr(module, "has_sliding_layers"):  # Qwen's, worked out when the model was made
            setattr(module, "has_sliding_layers", "sliding_attention" in live.layer_types)  # noqa: B010
    if any(isinstance(layer, SwappedLinearAttention) for layer in new):
        model._can_compile_fullgraph = False  # type: ignore[assignment]  # a state counts on the host
    model.set_attn_implementation("attnzoo")  # type: ignore[operator]
    if plan.refusal:
        hold(model)
        warnings.warn(
            "save_pretrained of this model will not load as what it is now in stock transformers, only after `import "
            f"attnzoo.hf`: {plan.refusal}",
            stacklevel=2,
        )
    else:
        release(model)
    return model


def rebuild(model: PreTrainedModel, specs: Sequence[Spec]) -> None:
    """`swap` inside a model that was just made from a config of a swapped one: the same layers, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        swap(model, specs)


def _family(model: nn.Module) -> tuple[Family, Callable[[int], str]]:
    """The model's family and a function from layer number to the attention's path inside this model."""
    allowed = ", ".join([name for name in known_families() if name not in _CONVERT_ONLY] + list(ENCODERS))
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model must be a transformers model of type {allowed}, or have a torch.nn.MultiheadAttention in it; "
            f"got {type(model).__name__}"
        )
    model_type = stock_type(str(model.config.model_type))
    if model_type in _CONVERT_ONLY or model_type not in {*known_families(), *ENCODERS}:
        raise UnknownFamily(f"model_type {model_type!r} is not among those that swap knows: {allowed}")
    family = ENCODERS[model_type] if model_type in ENCODERS else family_for(model_type)
    base = family.base if hasattr(model, family.base.removesuffix(".")) else ""
    return family, lambda layer: base + family.attention.format(layer=layer)


def rotated(model: nn.Module) -> int:
    """How many leading dimensions of a head the model's RoPE rotates; 0 without one."""
    return next((2 * len(table) for name, table in model.named_buffers() if name.endswith("inv_freq")), 0)


def _put(model: nn.Module, path: str, layer: nn.Module, plan: Plan, number: int) -> None:
    parent, _, name = path.rpartition(".")
    if isinstance(layer, SwappedLatentAttention):  # perhaps one that was there
        layer.mask, layer.narrower, layer.spec = plan.masks[number], plan.narrower, plan.specs[number]  # type: ignore[assignment]
    setattr(model.get_submodule(parent), name, layer)


def _layer(
    old: nn.Module, number: int, geometry: Geometry, family: Family, plan: Plan, model: PreTrainedModel
) -> nn.Module:
    spec, mask = plan.specs[number], plan.masks[number]
    if isinstance(old, SwappedLatentAttention) or (isinstance(old, SwappedLinearAttention) and old.spec == spec):
        return old
    heads = heads_of(old, geometry) if isinstance(spec, MLA) else spec.num_kv_heads  # type: ignore[attr-defined]
    parts, trained = (
        old.projections()
        if isinstance(old, SwappedAttention | SwappedLinearAttention)
        else split_projections(old, family, geometry)
    )
    parts = merge_heads(parts, heads, method="mean", layer=number)
    sizes = replace(geometry, num_kv_heads=heads)
    if isinstance(spec, Linear):
        return SwappedLinearAttention(old, parts, trained, family, sizes, spec)
    if isinstance(spec, MLA):
        rope = rope_of(model, spec.rope_frequencies or ())
        return SwappedLatentAttention(old, parts, trained, family, sizes, spec, rope, mask=mask, narrower=plan.narrower)
    return SwappedAttention(
        old, parts, trained, family, sizes, mask=mask, narrower=plan.narrower, stock=plan.stock[number]
    )
