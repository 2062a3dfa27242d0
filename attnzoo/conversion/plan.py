"""What a folder conversion will do, worked out from config.json and the shards' headers alone."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.conversion.errors import ConversionError, Refusal
from attnzoo.conversion.families import Config, Family, Geometry, family_for
from attnzoo.conversion.merge import merge_heads
from attnzoo.conversion.shards import FLOATS, Entry, Shard
from attnzoo.specs import GQA, Spec


@dataclass(frozen=True)
class Layer:
    """Where one layer's attention weights are: name inside the attention module -> full name."""

    number: int
    stem: str
    weights: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """A conversion: the families and sizes before and after, the new config, and what each output shard will hold."""

    family: Family
    holder: Family
    geometry: Geometry
    target: Geometry
    spec: GQA
    config: Config
    shards: list[Shard]
    layers: list[Layer]

    def convert(self, layer: Layer, tensors: dict[str, Tensor], method: str, seed: int) -> dict[str, Tensor]:
        """One layer's new attention weights: tensors by name inside the attention module -> by full name."""
        projections = self.family.split(tensors, self.geometry)
        merged = merge_heads(projections, self.target.num_kv_heads, method, seed, layer=layer.number)
        return {layer.stem + name: tensor for name, tensor in self.holder.join(merged, self.target).items()}


def make_plan(folder: Path, config: Config, shards: list[Shard], spec: Spec | Sequence[Spec]) -> Plan:
    """The plan, or the error: raises ConversionError for whatever the config and the headers can tell."""
    family = family_for(str(config.get("model_type")))
    if config.get("quantization_config"):
        raise ConversionError(
            f"{folder} is quantised ({_method(config)}); dequantise it first: heads are averaged as numbers"
        )
    geometry = family.geometry(config)
    gqa = _one_for_all(spec, geometry.num_layers)
    kv_heads = geometry.num_kv_heads if gqa.num_kv_heads is None else gqa.num_kv_heads
    new_config = family.with_kv_heads(config, kv_heads)
    holder = family_for(new_config["model_type"])
    if gqa.mask is not None:
        new_config = holder.with_mask(new_config, gqa.mask)
    layers = _find_layers(folder, family, geometry, shards)
    _check_rest(folder, family, config, geometry.num_layers, {name for shard in shards for name in shard.entries})
    plan = Plan(family, holder, geometry, replace(geometry, num_kv_heads=kv_heads), gqa, new_config, [], layers)
    return replace(plan, shards=[_output(plan, folder, shard, shards) for shard in shards])


def _method(config: Config) -> Any:
    quantization = config["quantization_config"]
    return quantization.get("quant_method", "unknown method") if isinstance(quantization, dict) else quantization


def _one_for_all(spec: Spec | Sequence[Spec], num_layers: int) -> GQA:
    specs = [spec] if isinstance(spec, Spec) else list(spec)
    if not isinstance(spec, Spec) and len(specs) != num_layers:
        raise ConversionError(f"spec lists {len(specs)} layers, the model has {num_layers}")
    for one in specs:
        if not isinstance(one, GQA):
            raise ConversionError(f"spec must be a GQA or a list of them, one a layer; got {one!r}")
        if one != specs[0]:
            raise Refusal(
                f"a stock config holds one number of KV heads and one mask for all layers, not {specs[0]!r} and "
                f"{one!r}; attnzoo.swap holds them in memory"
            )
    return specs[0]  # type: ignore[return-value]


def _find_layers(folder: Path, family: Family, geometry: Geometry, shards: list[Shard]) -> list[Layer]:
    found: dict[int, dict[str, str]] = {}
    for shard in shards:
        for name in shard.entries:
            if at := family.locate(name):
                found.setdefault(at[0], {})[at[1]] = name
    if not found:
        raise ConversionError(f"{folder} has no {family.model_type} attention ({family.attention_path(0)}...)")
    if max(found) >= geometry.num_layers:
        raise ConversionError(
            f"{folder} has tensors of layer {max(found)}; its config says {geometry.num_layers} layers"
        )
    # The prefix is the same in all layers, so a layer that is missing altogether can be named too.
    inner, name = next(iter(next(iter(found.values())).items()))
    base = family.base if name.startswith(family.base) else ""
    layers = []
    for number in range(geometry.num_layers):
        names = found.get(number, {})
        stem = f"{base}{family.attention.format(layer=number)}."
        for inner in family.required:
            if inner not in names:
                raise ConversionError(f"tensor {stem}{inner} is missing from {folder}")
        try:
            family.check_names(dict.fromkeys(names, torch.empty(0)))
        except ConversionError as error:
            raise ConversionError(f"{folder}, {stem}: {error}") from None
        layers.append(
            Layer(number, stem, {inner: name for inner, name in names.items() if inner not in family.buffers})
        )
    return layers


def _check_rest(folder: Path, family: Family, config: Config, num_layers: int, names: set[str]) -> None:
    """Raise for what is missing outside the attention, as far as that can be told without the model class."""
    base = family.base if any(name.startswith(family.base) for name in names) else ""
    wanted = {base + name for name in family.outside}
    for name in names:  # all layers of these families are alike: what one has, the others have
        if match := re.fullmatch(rf"{re.escape(base)}(layers|h)\.\d+\.(.+)", name):
            wanted.update(f"{base}{match[1]}.{layer}.{match[2]}" for layer in range(num_layers))
    causal = any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in config.get("architectures") or ())
    if causal and config.get("tie_word_embeddings") is False and "embed_out.weight" not in names:
        wanted.add("lm_head.weight")
    if missing := sorted(wanted - names):
        raise ConversionError(f"tensor {missing[0]} is missing from {folder}")


def _output(plan: Plan, folder: Path, shard: Shard, shards: list[Shard]) -> Shard:
    entries = {name: entry for shard in shards for name, entry in shard.entries.items()}
    attention: dict[str, Tensor] = {}
    for layer in plan.layers:
        if any(name in shard.entries for name in layer.weights.values()):
            tensors = {inner: _meta(folder, name, entries[name]) for inner, name in layer.weights.items()}
            try:
                attention |= plan.convert(layer, tensors, "first", 0)
            except ConversionError as error:
                raise ConversionError(f"{folder}, {layer.stem}: {error}") from None
    out = {}
    for name, entry in shard.entries.items():
        tensor = attention.get(name)
        if tensor is None:
            tensor = plan.family.carry(name, torch.empty(entry.shape, device="meta"), plan.holder)
        if tensor is not None:
            out[name] = entry.reshaped(tuple(tensor.shape))
    return Shard(shard.name, out, shard.metadata)


def _meta(folder: Path, name: str, entry: Entry) -> Tensor:
    if entry.dtype not in FLOATS:
        raise ConversionError(
            f"tensor {name} of {folder} is stored as {entry.dtype}; attention weights have to be {', '.join(FLOATS)}"
        )
    return torch.empty(entry.shape, dtype=FLOATS[entry.dtype], device="meta")
