"""What a folder conversion will do, worked out from config.json and the shards' headers alone."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.conversion.errors import ConversionError, Refusal
from attnzoo.conversion.families import Config, Family, Geometry, Projections, family_for
from attnzoo.conversion.families.base import Move
from attnzoo.conversion.merge import merge_heads
from attnzoo.conversion.shards import FLOATS, Entry, Shard
from attnzoo.specs import GQA, Spec


@dataclass(frozen=True)
class Layer:
    """Where one attention's weights are, and what else they are stored with: name inside the module -> full name.

    `stem` begins the names of the source, `new_stem` those of the result.
    """

    number: int
    stem: str
    new_stem: str
    weights: dict[str, str]
    beside: dict[str, str]

    @property
    def sources(self) -> dict[str, str]:
        """All that `Plan.convert` takes."""
        return self.weights | self.beside


@dataclass(frozen=True)
class Plan:
    """A conversion: the families and sizes before and after, the new config, and what each output shard will hold.

    `moves` says where the tensors that are no attention weights come from.
    """

    family: Family
    holder: Family
    geometry: Geometry
    target: Geometry
    spec: GQA
    config: Config
    shards: list[Shard]
    layers: list[Layer]
    moves: dict[str, Move]

    def convert(self, layer: Layer, tensors: dict[str, Tensor], method: str, seed: int) -> dict[str, Tensor]:
        """One layer's new attention weights: tensors by the words of `layer.sources` -> by full name."""
        projections = self.family.split({name: tensors[name] for name in layer.weights}, self.geometry)
        merged = merge_heads(projections, self.target.num_kv_heads, method, seed, layer=layer.number)
        return self.house(layer, merged, tensors)

    def house(self, layer: Layer, merged: Projections, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Converted projections as they are stored, by full name; `tensors` holds at least those of `layer.beside`."""
        beside = {name: tensors[name] for name in layer.beside}
        new = self.family.house(merged, beside, self.holder, self.config)
        return {layer.new_stem + name: tensor for name, tensor in new.items()}


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
    names = {name for shard in shards for name in shard.entries}
    layers = _find_layers(folder, family, holder, geometry, names)
    _check_rest(folder, family, config, geometry.num_layers, names)
    weights = {name for layer in layers for name in layer.weights.values()}
    moves = family.moves([name for shard in shards for name in shard.entries if name not in weights], holder)
    target = replace(geometry, num_kv_heads=kv_heads)
    plan = Plan(family, holder, geometry, target, gqa, new_config, [], layers, moves)
    return replace(plan, shards=_outputs(plan, folder, shards))


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


def _find_layers(
    folder: Path, family: Family, holder: Family, geometry: Geometry, tensors: Collection[str]
) -> list[Layer]:
    found: dict[int, dict[str, str]] = {}
    for name in tensors:
        if at := family.locate(name):
            found.setdefault(at[0], {})[at[1]] = name
    if not found:
        raise ConversionError(f"{folder} has no {family.model_type} attention ({family.attention_path(0)}...)")
    count = family.attentions(geometry)
    if max(found) >= count:
        raise ConversionError(f"{folder} has tensors of layer {max(found)}; its config says {count} layers")
    # The prefix is the same in all layers, so a layer that is missing altogether can be named too.
    name = next(iter(next(iter(found.values())).values()))
    base, new_base = (family.base, holder.base) if name.startswith(family.base) else ("", "")
    layers = []
    for number in range(count):
        names = found.get(number, {})
        stem = f"{base}{family.path(number)}."
        beside = {word: base + name for word, name in family.beside(number, holder).items()}
        for name in [*(stem + inner for inner in family.required), *beside.values()]:
            if name not in tensors:
                raise ConversionError(f"tensor {name} is missing from {folder}")
        try:
            family.check_names(dict.fromkeys(names, torch.empty(0)))
        except ConversionError as error:
            raise ConversionError(f"{folder}, {stem}: {error}") from None
        weights = {inner: name for inner, name in names.items() if inner not in family.buffers}
        layers.append(Layer(number, stem, f"{new_base}{holder.path(number)}.", weights, beside))
    return layers


def _check_rest(folder: Path, family: Family, config: Config, num_layers: int, names: set[str]) -> None:
    """Raise for what is missing outside the attention, as far as that can be told without the model class."""
    base = family.base if any(name.startswith(family.base) for name in names) else ""
    wanted = {base + name for name in family.outside}
    blocks = base + family.attention.partition("{layer}")[0]
    for name in names:  # layers are alike: what one has, the others have
        match = re.fullmatch(rf"{re.escape(blocks)}\d+\.(.+)", name)
        if match and not match[1].startswith(family.varied):
            wanted.update(f"{blocks}{layer}.{match[1]}" for layer in range(num_layers))
    causal = any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in config.get("architectures") or ())
    if causal and config.get("tie_word_embeddings") is False and "embed_out.weight" not in names:
        wanted.add("lm_head.weight")
    if missing := sorted(wanted - names):
        raise ConversionError(f"tensor {missing[0]} is missing from {folder}")


def _outputs(plan: Plan, folder: Path, shards: list[Shard]) -> list[Shard]:
    """Each shard as it will be: a tensor stays where it was, or where the first that it is made of was."""
    entries = {name: entry for shard in shards for name, entry in shard.entries.items()}
    made: dict[str, dict[str, Entry]] = {name: {} for name in entries}  # source -> what takes its place
    for layer in plan.layers:
        tensors = {inner: _meta(folder, name, entries[name]) for inner, name in layer.sources.items()}
        try:
            new = plan.convert(layer, tensors, "first", 0)
        except ConversionError as error:
            raise ConversionError(f"{folder}, {layer.stem}: {error}") from None
        first = next(iter(layer.weights.values()))
        for name, tensor in new.items():
            made[name if name in made else first][name] = _entry(tensor)
    for name, move in plan.moves.items():
        source = entries[move.sources[0]]
        tensor = move.make(*(torch.empty(entries[source].shape, device="meta") for source in move.sources))
        made[move.sources[0]][name] = source.reshaped(tuple(tensor.shape))
    out = []
    for shard in shards:
        held = {name: entry for source in shard.entries for name, entry in made[source].items()}
        out.append(Shard(shard.name, held, shard.metadata))
    return out


def _entry(tensor: Tensor) -> Entry:
    words = {dtype: word for word, dtype in FLOATS.items()}
    return Entry(words[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.element_size())


def _meta(folder: Path, name: str, entry: Entry) -> Tensor:
    if entry.dtype not in FLOATS:
        raise ConversionError(
            f"tensor {name} of {folder} is stored as {entry.dtype}; attention weights have to be {', '.join(FLOATS)}"
        )
    return torch.empty(entry.shape, dtype=FLOATS[entry.dtype], device="meta")
