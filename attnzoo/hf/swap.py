"""`attnzoo.swap`: another attention mechanism inside a transformers model, in place, with its weights carried over."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from attnzoo.conversion import Refusal, UnknownFamily, merge_heads
from attnzoo.conversion.families import Family, Geometry, family_for
from attnzoo.conversion.families import known as known_families
from attnzoo.hf.layers import SwappedAttention, flag_of
from attnzoo.masks import Causal, Full, Mask, SlidingWindow
from attnzoo.specs import GQA, Spec

Model = TypeVar("Model", bound=nn.Module)

# Its layers are called in a way of their own.
_CONVERT_ONLY = frozenset({"gpt_bigcode"})
_NO_WINDOW = 1 << 30


def swap(model: Model, spec: Spec | Sequence[Spec]) -> Model:
    """Replace the attention layers of a transformers causal language model, in place.

    Weights are carried over: KV heads are merged to their group's mean (arXiv 2305.13245), everything else is kept as
    it is, so a spec that changes nothing changes no logit. Device, dtype, training mode and `requires_grad` are kept
    too. The model's attn_implementation becomes "attnzoo"; it generates with dynamic and static caches of the new size.

    Where the stock family can hold the result, the model's config and `state_dict` say it in the family's own terms,
    and `save_pretrained` writes a checkpoint that loads without attnzoo. Where it cannot, a warning says so.

    Args:
        model: a Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma2, Gemma3 (text), Phi, Phi-3, GPT-2 or GPT-NeoX model.
        spec: one for all layers, or a list of one a layer. `num_kv_heads` has to divide the layer's KV heads; `mask`
            takes the place of the layer's own, and a language model's stays causal whatever it says.

    Returns:
        `model`.

    Raises:
        ValueError: for another kind of model or spec, heads that do not divide, or a list of another length. Nothing is
            changed then.
    """
    family, paths = _family(model)
    live: PreTrainedConfig = model.config  # type: ignore[assignment]
    config = live.to_dict()
    geometry = family.geometry(config)
    specs = _one_a_layer(spec, geometry.num_layers)
    old = [model.get_submodule(paths(layer)) for layer in range(geometry.num_layers)]
    heads = [_heads(layer, one, geometry) for layer, one in zip(old, specs, strict=True)]
    plan = _plan(family, config, geometry, specs, heads, old)
    new = [
        _layer(layer, number, geometry, family, heads[number], plan.masks[number], plan.narrower, plan.stock[number])
        for number, layer in enumerate(old)
    ]

    for number, layer in enumerate(new):
        path, _, name = paths(number).rpartition(".")
        setattr(model.get_submodule(path), name, layer)
    for key, value in plan.config.items():
        if key not in config or config[key] != value:
            setattr(live, key, value)
    if not plan.refusal and isinstance((config.get("attnzoo") or {}).get("spec"), list):
        del live.attnzoo  # an earlier swap's, which no longer holds
    for module in model.modules():
        if hasattr(module, "has_sliding_layers"):  # Qwen's, worked out when the model was made
            setattr(module, "has_sliding_layers", "sliding_attention" in live.layer_types)  # noqa: B010
    model.set_attn_implementation("attnzoo")  # type: ignore[operator]
    if plan.refusal:
        warnings.warn(
            f"save_pretrained of this model will not load as what it is now in stock transformers: {plan.refusal}",
            stacklevel=2,
        )
    return model


@dataclass(frozen=True)
class _Plan:
    config: dict[str, Any]
    masks: list[Mask]
    narrower: bool  # whether the layers' masks hide more than the config says
    stock: list[bool]  # whether the family's tensors can hold each layer
    refusal: str  # why no stock config holds the whole; empty if one does


def _family(model: nn.Module) -> tuple[Family, Any]:
    """The model's family and a function from layer number to the attention's path inside this model."""
    allowed = ", ".join(name for name in known_families() if name not in _CONVERT_ONLY)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model must be a transformers model of type {allowed}; got {type(model).__name__}")
    model_type = str(model.config.model_type)
    if model_type in _CONVERT_ONLY:
        raise UnknownFamily(f"model_type {model_type!r} is not among those that swap knows: {allowed}")
    family = family_for(model_type)
    base = family.base if hasattr(model, family.base.removesuffix(".")) else ""
    return family, lambda layer: base + family.attention.format(layer=layer)


def _one_a_layer(spec: Spec | Sequence[Spec], layers: int) -> list[GQA]:
    specs = [spec] * layers if isinstance(spec, Spec) else list(spec)
    if len(specs) != layers:
        raise ValueError(f"spec lists {len(specs)} layers, the model has {layers}")
    for one in specs:
        if not isinstance(one, GQA):
            raise ValueError(f"spec must be a GQA or a list of them, one a layer; got {one!r}")
    return specs  # type: ignore[return-value]


def _heads(layer: nn.Module, spec: GQA, geometry: Geometry) -> int:
    have = layer.num_kv_heads if isinstance(layer, SwappedAttention) else geometry.num_kv_heads
    return have if spec.num_kv_heads is None else spec.num_kv_heads


def _layer(
    old: nn.Module,
    number: int,
    geometry: Geometry,
    family: Family,
    heads: int,
    mask: Mask,
    narrower: bool,
    stock: bool,
) -> SwappedAttention:
    if isinstance(old, SwappedAttention):
        projections, trained = old.projections(), old.trained()
    else:
        tensors = {name: parameter.detach() for name, parameter in old.named_parameters()}
        projections = family.split(tensors, geometry)
        trained = family.split({name: flag_of(parameter) for name, parameter in old.named_parameters()}, geometry)
    merged = merge_heads(projections, heads, method="mean", layer=number)
    sizes = replace(geometry, num_kv_heads=heads)
    return SwappedAttention(old, merged, trained, family, sizes, mask=mask, narrower=narrower, stock=stock)


def _plan(
    family: Family,
    config: dict[str, Any],
    geometry: Geometry,
    specs: list[GQA],
    heads: list[int],
    old: list[nn.Module],
) -> _Plan:
    new, refusals, stock = config, [], []
    for count in heads:
        try:
            held = family.with_kv_heads(config, count)
            stock.append(held["model_type"] == family.model_type)
            if not stock[-1]:
                refusals.append(f"{held['model_type']}, not {family.model_type}, holds it; attnzoo.convert writes that")
            elif len(set(heads)) == 1:
                new = held
        except Refusal as refusal:
            stock.append(False)
            refusals.append(str(refusal))
    if len(set(heads)) > 1:
        refusals.append("its layers differ in their number of KV heads")

    own = [_causal(spec.mask, layer) for spec, layer in zip(specs, old, strict=True)]
    kept = [_mask(layer, number, config) for number, layer in enumerate(old)]
    narrower = any(isinstance(layer, SwappedAttention) and layer.narrower for layer in old)
    masks = [mask or before for mask, before in zip(own, kept, strict=True)]
    if masks != kept or narrower:
        try:
            if len(set(masks)) > 1:
                raise Refusal("its layers differ in their masks")
            new, narrower = family.with_mask(new, masks[0]), False
        except Refusal as refusal:
            # Every layer hides keys itself then, so that caches and the model's masks must not hide any before.
            refusals.append(str(refusal))
            narrower = True
            if new.get("sliding_window") is not None:
                new = new | {"sliding_window": _NO_WINDOW}
    if refusals:
        new = new | {"attnzoo": {"spec": [GQA(h, m).to_dict() for h, m in zip(heads, masks, strict=True)]}}
    return _Plan(new, masks, narrower, stock, refusals[0] if refusals else "")


def _causal(mask: Mask | None, layer: nn.Module) -> Mask | None:
    """A spec's mask, without the later tokens for a layer that must not see them."""
    if mask is None or mask.causal or not getattr(layer, "is_causal", True):
        return mask
    return Causal() if isinstance(mask, Full) else mask & Causal()


def _mask(layer: nn.Module, number: int, config: dict[str, Any]) -> Mask:
    """Which query sees which key in a layer as it is."""
    if isinstance(layer, SwappedAttention):
        assert layer.mask is not None
        return layer.mask
    if not getattr(layer, "is_causal", True):
        return Full()
    types = config.get("layer_types")
    window = config.get("sliding_window") if types is None or types[number] == "sliding_attention" else None
    return Causal() if window is None else SlidingWindow(window)
