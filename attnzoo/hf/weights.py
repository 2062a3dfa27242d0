"""Moving a layer's weights and numbers into the layer that takes its place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from attnzoo.conversion import Refusal
from attnzoo.conversion.families import Family, Geometry, Projections
from attnzoo.layers import GroupedQueryAttention

WEIGHTS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}


def take_over(
    layer: GroupedQueryAttention, old: nn.Module, projections: Projections, trained: Projections, outputs: bool
) -> None:
    """Give `layer` the projections, norms, dropout and number of `old`; without `outputs` it has no o_proj.

    A parameter of `old` whose storage a tensor is goes over itself.
    """
    take_place(layer, old)
    layer.q_norm, layer.k_norm = getattr(old, "q_norm", None), getattr(old, "k_norm", None)
    if not outputs:
        layer.o_proj = nn.Identity()  # type: ignore[assignment]
    for name, part in WEIGHTS.items():
        linear = getattr(layer, name)
        if isinstance(linear, nn.Identity):
            continue
        for kind, source in (("weight", part), ("bias", f"{part}_bias")):
            tensor = getattr(projections, source)
            if tensor is not None:
                flat = tensor.reshape(linear.weight.shape) if kind == "weight" else tensor.flatten()
                setattr(linear, kind, _parameter(old, name, kind, flat, getattr(trained, source)))


def take_place(layer: nn.Module, old: nn.Module) -> None:
    """What a model's blocks and caches ask of an attention layer, whatever its mechanism."""
    layer.config, layer.layer_idx = old.config, old.layer_idx
    layer.is_causal = bool(getattr(old, "is_causal", True))  # type: ignore[assignment]
    layer.resid_dropout = getattr(old, "resid_dropout", None)  # type: ignore[assignment]
    if rate := getattr(old, "residual_dropout", 0.0):  # Starcoder2's, a number
        layer.resid_dropout = nn.Dropout(rate)  # type: ignore[assignment, arg-type]
    layer.train(old.training)


def undone(weights: Mapping[str, Tensor], geometry: Geometry) -> Projections:
    """The weights of a `GroupedQueryAttention` by name, as views in the form that families speak."""
    g = geometry
    heads = {"q": g.num_heads, "k": g.num_kv_heads, "v": g.num_kv_heads}
    parts: dict[str, Tensor | None] = {}
    for layer, part in WEIGHTS.items():
        weight, bias = weights.get(f"{layer}.weight"), weights.get(f"{layer}.bias")
        if part == "o":
            weight = no_outputs(g) if weight is None else weight
            parts |= {"o": weight.view(g.dim, g.num_heads, g.head_dim), "o_bias": bias}
        else:
            assert weight is not None
            parts[part] = weight.view(heads[part], g.head_dim, g.dim)
            parts[f"{part}_bias"] = None if bias is None else bias.view(heads[part], g.head_dim)
    norms = {name: weights.get(f"{name}.weight") for name in ("q_norm", "k_norm")}
    return Projections(**parts, **norms)  # type: ignore[arg-type]


def no_outputs(geometry: Geometry) -> Tensor:
    """What stands for the output projection of a layer that has none: a tensor of its shape and of no memory."""
    return torch.empty(geometry.dim, geometry.num_heads, geometry.head_dim, device="meta")


def own_projections(layer: GroupedQueryAttention, geometry: Geometry) -> tuple[Projections, Projections]:
    """A swapped layer's weights, as views, and which of them require gradients, as bool."""
    named = dict(layer.named_parameters())
    weights = {name: parameter.detach() for name, parameter in named.items()}
    return undone(weights, geometry), undone({name: flag_of(p) for name, p in named.items()}, geometry)


def split_projections(layer: nn.Module, family: Family, geometry: Geometry) -> tuple[Projections, Projections]:
    """A stock layer's weights, as views where the storage allows, and which of them require gradients, as bool."""
    named = dict(layer.named_parameters())
    weights = {name: parameter.detach() for name, parameter in named.items()}
    parts = family.split(weights, geometry)
    if parts.q_norm is not None and getattr(layer, "q_norm", None) is None:
        raise Refusal(f"the norms of q and k of {type(layer).__name__} are not known to swap, only to convert")
    return parts, family.split({name: flag_of(p) for name, p in named.items()}, geometry)


def flag_of(parameter: nn.Parameter) -> Tensor:
    """A bool tensor of the parameter's shape, and of no memory, that says whether it requires gradients."""
    return torch.tensor(parameter.requires_grad, device="cpu").expand(parameter.shape)


def dropout_of(old: nn.Module) -> float:
    """The dropout of a layer's attention weights."""
    module = getattr(old, "attn_dropout", None)  # GPT-2
    if module is None:
        module = getattr(old, "dropout", None)  # BERT; a number in a layer of ours
    if module is None:
        module = getattr(old, "attention_dropout", 0.0)
    return float(module.p if isinstance(module, nn.Dropout) else module)  # type: ignore[arg-type]


def scale_of(old: nn.Module) -> float:
    """What a layer multiplies its scores by."""
    scale = old.scale if hasattr(old, "scale") else old.scaling
    return float(scale)  # type: ignore[arg-type]


def softcap_of(old: nn.Module, family: Family) -> float | None:
    """The softcap of a layer's scores."""
    if hasattr(old, "softcap"):
        return old.softcap  # type: ignore[return-value]
    # Gemma3's layers have the attribute as well, and do not use it.
    return getattr(old, "attn_logit_softcapping", None) if family.model_type == "gemma2" else None


def own_cache(past_key_values: Cache | None, layer_past: Cache | None) -> Cache | None:
    """The cache of self-attention, under either of its names."""
    cache = past_key_values if past_key_values is not None else layer_past
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def check_implementation(layer: nn.Module) -> None:
    """ValueError if the model was set to another attn_implementation, whose masks mean something else."""
    implementation = layer.config._attn_implementation  # type: ignore[union-attr]
    if implementation != "attnzoo":
        raise ValueError(
            f'a swapped model needs attn_implementation="attnzoo", which swap sets; got {implementation!r}'
        )


def _parameter(old: nn.Module, layer: str, name: str, tensor: Tensor, trained: Tensor) -> nn.Parameter:
    """The old layer's parameter itself where the tensor is its storage, so that optimizers and ties stay valid."""
    there = getattr(getattr(old, layer, None), name, None)
    if isinstance(there, nn.Parameter) and there.shape == tensor.shape and there.data_ptr() == tensor.data_ptr():
        return there
    if tensor.untyped_storage().nbytes() > tensor.nbytes:  # a part of a fused weight, which can go then
        tensor = tensor.clone()
    return nn.Parameter(tensor.contiguous(), requires_grad=bool(trained[(0,) * trained.ndim]))
