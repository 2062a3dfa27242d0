"""What `attnzoo.swap` will do, worked out before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from attnzoo.conversion import Refusal
from attnzoo.conversion.families import Family, Geometry
from attnzoo.conversion.windows import hold_masks
from attnzoo.hf.latent import SwappedLatentAttention
from attnzoo.hf.latent_weights import filled
from attnzoo.hf.layers import SwappedAttention
from attnzoo.hf.linear import SwappedLinearAttention
from attnzoo.masks import Causal, Full, Mask, SlidingWindow
from attnzoo.specs import GQA, MLA, Linear, Spec

_NO_WINDOW = 1 << 30


@dataclass(frozen=True)
class Plan:
    """The model after the swap.

    Attributes:
        config: its config dictionary.
        specs: one a layer, with nothing left open.
        masks: which query sees which key, layer by layer.
        narrower: whether the layers' masks hide more than the config says.
        stock: whether each layer's tensors are the family's.
        refusal: why no stock config holds the whole; empty if one does.
    """

    config: dict[str, Any]
    specs: list[Spec]
    masks: list[Mask]
    narrower: bool
    stock: list[bool]
    refusal: str


def make_plan(
    family: Family, config: dict[str, Any], specs: Sequence[Spec], old: Sequence[nn.Module], rotary_dim: int
) -> Plan:
    """The plan for layers `old` of a model with `config`; ValueError for a spec that does not fit its layer."""
    geometry = family.geometry(config)
    whole = [_filled(spec, layer, geometry, family, rotary_dim) for spec, layer in zip(specs, old, strict=True)]
    new, stock, refusals = _heads(family, config, whole)
    kept = [mask_of(layer, number, config) for number, layer in enumerate(old)]
    masks = [_mask(spec, layer, before) for spec, layer, before in zip(whole, old, kept, strict=True)]
    narrower = any(getattr(layer, "narrower", False) for layer in old)
    if masks != kept or narrower:
        try:
            new, narrower = hold_masks(family, new, masks), False
        except Refusal as refusal:
            # Every layer hides keys itself then, so that caches and the model's masks must not hide any before.
            refusals.append(str(refusal))
            narrower = True
            if new.get("sliding_window") is not None:
                new = new | {"sliding_window": _NO_WINDOW}
    final = [
        spec if isinstance(spec, Linear) else replace(spec, mask=mask)  # type: ignore[call-arg]
        for spec, mask in zip(whole, masks, strict=True)
    ]
    if refusals:
        stock = [False] * len(stock)  # from_pretrained loads by the names that the layers have
        new = new | {"attnzoo": {"spec": [spec.to_dict() for spec in final]}}
    return Plan(new, final, masks, narrower, stock, refusals[0] if refusals else "")


def one_a_layer(spec: Spec | Sequence[Spec], layers: int) -> list[Spec]:
    """A spec for each layer; ValueError for a list of another length, or of other things."""
    specs = [spec] * layers if isinstance(spec, Spec) else list(spec)
    if len(specs) != layers:
        raise ValueError(f"spec lists {len(specs)} layers, the model has {layers}")
    for one in specs:
        if not isinstance(one, GQA | MLA | Linear):
            raise ValueError(f"spec must be a GQA, MLA or Linear, or a list of them, one a layer; got {one!r}")
    return specs


def heads_of(layer: nn.Module, geometry: Geometry) -> int:
    """KV heads that a layer has now."""
    own = isinstance(layer, SwappedAttention | SwappedLinearAttention)
    return layer.num_kv_heads if own else geometry.num_kv_heads  # type: ignore[return-value]


def mask_of(layer: nn.Module, number: int, config: dict[str, Any]) -> Mask:
    """Which query sees which key in a layer as it is."""
    if isinstance(layer, SwappedAttention | SwappedLatentAttention):
        assert layer.mask is not None
        return layer.mask
    if not getattr(layer, "is_causal", True):
        return Full()
    if isinstance(layer, SwappedLinearAttention):
        return Causal()
    types = config.get("layer_types")
    window = config.get("sliding_window") if types is None or types[number] == "sliding_attention" else None
    return Causal() if window is None else SlidingWindow(window)


def _filled(spec: Spec, layer: nn.Module, geometry: Geometry, family: Family, rotary_dim: int) -> Spec:
    """The spec with its open fields taken from the layer."""
    heads = heads_of(layer, geometry)
    if isinstance(layer, SwappedLatentAttention):
        same = isinstance(spec, MLA) and all(
            value is None or value == getattr(layer.spec, name) for name, value in vars(spec).items() if name != "mask"
        )
        if not same:
            raise ValueError(
                f"spec must be MLA() for layer {layer.layer_idx}, whose heads were factored into {layer.spec}; swap "
                f"the model that it was made from; got {spec}"
            )
        return replace(layer.spec, mask=spec.mask)  # type: ignore[attr-defined, union-attr]
    if isinstance(spec, MLA):
        if not getattr(family, "outputs", True):
            raise ValueError(f"spec must be a GQA or Linear for the encoder {family.model_type}; got {spec}")
        return filled(spec, replace(geometry, num_kv_heads=heads), rotary_dim)
    assert isinstance(spec, GQA | Linear)
    if isinstance(spec, GQA) and spec.mask is not None and spec.mask.heads not in (None, geometry.num_heads):
        raise ValueError(f"mask is made for {spec.mask.heads} heads; the model has {geometry.num_heads}")
    if isinstance(spec, Linear) and not getattr(layer, "is_causal", True) and (spec.window or spec.decay):
        raise ValueError(f"window and decay count tokens back, and this layer is not causal; got {spec}")
    return replace(spec, num_kv_heads=heads if spec.num_kv_heads is None else spec.num_kv_heads)


def _heads(family: Family, config: dict[str, Any], specs: list[Spec]) -> tuple[dict[str, Any], list[bool], list[str]]:
    """The config with the new number of KV heads if it holds one, which layers it holds, and why not the others."""
    new, stock, refusals = config, [], []
    counts = [spec.num_kv_heads for spec in specs if isinstance(spec, GQA)]
    for spec in specs:
        if isinstance(spec, MLA):
            stock.append(False)
            refusals.append(f"no stock {family.model_type} class has latent attention")
            continue
        assert isinstance(spec, GQA | Linear) and spec.num_kv_heads is not None
        try:
            held = family.with_kv_heads(config, spec.num_kv_heads)
        except Refusal as refusal:
            stock.append(False)
            refusals.append(str(refusal))
            continue
        stock.append(isinstance(spec, GQA) and held["model_type"] == family.model_type)
        if isinstance(spec, Linear):
            refusals.append(f"no stock {family.model_type} class has linear attention")
        elif not stock[-1]:
            refusals.append(f"{held['model_type']}, not {family.model_type}, holds it; attnzoo.convert writes that")
        elif len(counts) == len(specs) and len(set(counts)) == 1:
            new = held
    if len(set(counts)) > 1:
        refusals.append("its layers differ in their number of KV heads")
    return new, stock, refusals


def _mask(spec: Spec, layer: nn.Module, before: Mask) -> Mask:
    """A spec's mask, without the later tokens for a layer that must not see them; the layer's own if it has none."""
    causal = getattr(layer, "is_causal", True)
    if isinstance(spec, Linear):
        return Causal() if causal else Full()
    mask: Mask | None = spec.mask  # type: ignore[attr-defined]
    if mask is None:
        return before
    if mask.causal or not causal:
        return mask
    return Causal() if isinstance(mask, Full) else mask & Causal()
