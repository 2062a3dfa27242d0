"""`attnzoo.convert` to latent attention: of a model in memory, or folder to folder with one layer in memory."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from attnzoo.conversion import ConversionError
from attnzoo.conversion.calibration import Progress
from attnzoo.conversion.checkpoint import _files, _read, _source
from attnzoo.conversion.damage import LayerDamage
from attnzoo.conversion.families import Config, Family, Geometry, Projections, family_for
from attnzoo.conversion.folders import check_free, whole_folder
from attnzoo.conversion.latent import LatentWeights
from attnzoo.conversion.latent.method import ToLatent
from attnzoo.conversion.latent.stock import check_held
from attnzoo.conversion.rotary import Rotary
from attnzoo.conversion.shards import INDEX, read_json, read_shards
from attnzoo.hf.auto import stock_type
from attnzoo.hf.calibration import convert_layers
from attnzoo.hf.calibration_stage import Stage
from attnzoo.hf.latent_stock import Biases, deepseek_config, deepseek_tensors
from attnzoo.hf.latent_survey import worthiest_frequencies
from attnzoo.hf.latent_weights import filled, rope_of
from attnzoo.hf.plan import one_a_layer
from attnzoo.hf.swap import rebuild, rotated
from attnzoo.hf.weights import scale_of
from attnzoo.masks import Causal
from attnzoo.specs import MLA, Spec

_SHARD = 1 << 30  # bytes of a file of the result, and so of what waits in memory


@dataclass
class LatentPlan:
    """A conversion: where it starts, and the layers' sizes, all known."""

    config: Config
    family: Family
    geometry: Geometry
    weights: Mapping[str, Tensor]
    specs: list[MLA]
    original: Stage
    new: Stage
    scale: list[float]

    def attention(self, number: int) -> dict[str, Tensor]:
        """The original attention's tensors of a layer, by their names inside the module."""
        found = {}
        for name in self.weights:
            at = self.family.locate(name)
            if at is not None and at[0] == number and at[1] not in self.family.buffers:
                found[at[1]] = self.weights[name]
        return found

    def split(self, number: int, tensors: Mapping[str, Tensor]) -> tuple[Projections, Rotary]:
        """A layer's projections, and what RoPE turns in them."""
        p = self.family.split({name: t.to(self.original.device) for name, t in tensors.items()}, self.geometry)
        return _with_gains(p, self.family), self.family.rotary(self.config, number)

    @property
    def frequencies(self) -> Tensor:
        """`[F]`, radians a token; empty without RoPE."""
        tables = [table for name, table in self.original.model.named_buffers() if name.endswith("inv_freq")]
        return tables[0] if tables else torch.zeros(0)


def convert_latent_model(
    model: PreTrainedModel, spec: Spec | Sequence[Spec], calibration: Tensor | None = None, **fitting: Any
) -> tuple[PreTrainedModel, list[LayerDamage]]:
    """A copy of `model` with latent attention, ready to be trained, and the damage of each layer.

    Args:
        model: a transformers model that `attnzoo.swap` takes.
        spec: MLA, or a list of them, one a layer.
        calibration: token ids `[rows, S]` without padding; None: by the weights alone.
        fitting: `refit` and `steps`, see `ToLatent`.
    """
    device, dtype = model.device, model.dtype
    config = model.config.to_dict() | {"model_type": stock_type(str(model.config.model_type))}
    plan = _plan(config, dict(model.state_dict()), spec, calibration, device)
    made: dict[str, Tensor] = {}
    damages = _run(plan, calibration, lambda number, tensors: made.update(tensors), **fitting)

    new = copy.deepcopy(model)
    for number in range(plan.geometry.num_layers):
        new.get_submodule(plan.family.attention_path(number)).to("meta")
    rebuild(new, plan.specs)
    new.load_state_dict({name: t.to(device, dtype) for name, t in made.items()}, strict=False, assign=True)
    return new, damages


def convert_latent_folder(
    source: str | Path,
    spec: Spec | Sequence[Spec],
    out: str | Path,
    calibration: Tensor | None = None,
    *,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    **fitting: Any,
) -> tuple[Path, list[LayerDamage]]:
    """A checkpoint folder as a stock deepseek_v3 folder, with one layer in memory at a time; the damage of each layer.

    Args:
        source: config.json and safetensors.
        spec: an MLA, or a list of equal ones.
        out: the folder to write; it appears whole or not at all.
        calibration: token ids `[rows, S]` without padding; None: by the weights alone.
        overwrite: replace `out` if it is a checkpoint.
        device: where layers run.
        progress: told after each layer.
        fitting: `refit` and `steps`, see `ToLatent`.

    Raises:
        ConversionError: before anything is written; Refusal where deepseek_v3 does not hold the result.
    """
    folder = _source(source)
    out = check_free(out, overwrite=overwrite)
    if out == folder or out in folder.parents:
        raise ConversionError(f"out {out} is or contains the source {folder}; choose another folder")
    config = read_json(folder / "config.json")
    check_held(config, [one for one in one_a_layer(spec, config["num_hidden_layers"]) if isinstance(one, MLA)])
    files = _Files(folder)
    plan = _plan(config, files, spec, calibration, torch.device(device))
    check_held(config, plan.specs)
    carried = _files(folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) + sum(
        (folder / path).stat().st_size for path in carried
    )
    with whole_folder(out, overwrite=overwrite, size=size) as target:
        shards = _Shards(target)
        biases = _biases(plan)
        attention = {name for name in files if plan.family.locate(name) is not None}

        def keep(number: int, tensors: Mapping[str, Tensor]) -> None:
            stem = plan.family.attention_path(number) + "."
            w = LatentWeights.of({name.removeprefix(stem): t for name, t in tensors.items()})
            dtype = files.dtype_of(f"{stem}o_proj.weight")
            made = deepseek_tensors(w, plan.geometry, plan.specs[number], plan.scale[number], biases, dtype)
            shards.add({stem + name: t for name, t in made.items()})
            layer = stem.removesuffix(plan.family.attention.partition("{layer}")[2] + ".") + "."
            for name in files:
                if name.startswith(layer) and name not in attention:
                    shards.add({name: files[name]})
                    attention.add(name)

        damages = _run(plan, calibration, keep, progress=progress, **fitting)
        for name in files:
            if name not in attention:
                shards.add({name: files[name]})
        shards.finish()
        record = {
            "spec": plan.specs[0].to_dict(),
            "method": "latent",
            "source": config.get("_name_or_path") or folder.name,
        }
        if "attnzoo" in config:
            record["before"] = config["attnzoo"]
        new = deepseek_config(plan.original.model, plan.original.model.config.to_dict() | config, plan.specs[0], biases)
        _write(target / "config.json", {**new, "attnzoo": record})
        for path in carried:
            (target / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / path, target / path)
    return out, damages


def _plan(
    config: Config,
    weights: Mapping[str, Tensor],
    spec: Spec | Sequence[Spec],
    calibration: Tensor | None,
    device: torch.device,
) -> LatentPlan:
    family = family_for(str(config.get("model_type")))
    geometry = family.geometry(config)
    specs = one_a_layer(spec, geometry.num_layers)
    for one in specs:
        if not isinstance(one, MLA):
            raise ConversionError(f"spec must be an MLA or a list of them, one a layer; got {one!r}")
    path = family.base + family.attention
    original = Stage(config, weights, path, device=device, dtype=torch.float32)
    scale = [scale_of(original.attention_of(layer)) for layer in original.layers]
    if calibration is not None:
        specs = _with_frequencies(
            LatentPlan(config, family, geometry, weights, [], original, original, scale), specs, calibration
        )
    whole = [filled(one, geometry, rotated(original.model)) for one in specs]  # type: ignore[arg-type]
    whole = [one if one.mask is not None else replace(one, mask=Causal()) for one in whole]
    described = {"model_type": f"attnzoo_{family.model_type}", "attnzoo": {"spec": [one.to_dict() for one in whole]}}
    type(AutoConfig.for_model(described["model_type"])).from_dict({})  # which makes its model classes known
    new = Stage(config | described, _Without(weights, family), path, device=device, dtype=torch.float32)
    return LatentPlan(config, family, geometry, weights, whole, original, new, scale)


def _with_frequencies(plan: LatentPlan, specs: Sequence[Spec], calibration: Tensor) -> list[Spec]:
    """The specs with the frequencies that the text asks for, where they leave them open."""
    size = rotated(plan.original.model)
    chosen: dict[int, tuple[int, ...]] = {}
    out: list[Spec] = []
    for spec in specs:
        assert isinstance(spec, MLA)
        rope = filled(spec, plan.geometry, size).qk_rope_head_dim
        if size and rope and spec.rope_frequencies is None:
            if rope not in chosen:
                chosen[rope] = worthiest_frequencies(
                    plan.original,
                    plan.split,
                    plan.attention,
                    calibration,
                    rope_of(plan.original.model, (), calibration.shape[1]),
                    plan.frequencies,
                    plan.scale,
                    rope // 2,
                )
            spec = replace(spec, rope_frequencies=chosen[rope])
        out.append(spec)
    return out


def _run(
    plan: LatentPlan,
    calibration: Tensor | None,
    keep: Callable[[int, Mapping[str, Tensor]], None],
    progress: Progress | None = None,
    **fitting: Any,
) -> list[LayerDamage]:
    rope = rope_of(plan.original.model, (), None if calibration is None else calibration.shape[1])
    method = ToLatent(
        "latent", plan.split, plan.specs, rope, plan.frequencies, plan.scale, plan.family.attention_path, **fitting
    )
    if calibration is None:
        for number in range(plan.geometry.num_layers):
            keep(number, method(number, plan.attention(number), None))
            if progress is not None:
                progress(number + 1, plan.geometry.num_layers)
        return []
    damages, _ = convert_layers(
        plan.original,
        plan.new,
        method,
        plan.attention,
        calibration,
        keep=keep,
        storage=torch.float32,
        progress=progress,
    )
    return damages


def _with_gains(p: Projections, family: Family) -> Projections:
    """Norms' weights as what the norms multiply with: Gemma's add one."""
    if not family.model_type.startswith("gemma") or p.q_norm is None or p.k_norm is None:
        return p
    return Projections(**{**vars(p), "q_norm": 1 + p.q_norm, "k_norm": 1 + p.k_norm})


def _biases(plan: LatentPlan) -> Biases:
    names = plan.attention(0)
    queries = "q_proj.bias" in names
    return Biases(queries or any(name.endswith(".bias") for name in names), queries)


class _Files(Mapping[str, Tensor]):
    """The tensors of a checkpoint folder, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        shards, _ = read_shards(folder)
        self._where = {name: folder / shard.name for shard in shards for name in shard.entries}

    def __getitem__(self, name: str) -> Tensor:
        return _read(self._where[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def dtype_of(self, name: str) -> torch.dtype:
        with safe_open(self._where[name], framework="pt") as file:
            return file.get_slice(name)[:0].dtype  # type: ignore[no-any-return]


class _Without(Mapping[str, Tensor]):
    """All but the attention's tensors."""

    def __init__(self, weights: Mapping[str, Tensor], family: Family) -> None:
        self._weights, self._names = weights, [name for name in weights if family.locate(name) is None]

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Shards:
    """Writes tensors into files of about the same size, and the index of them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._waiting, self._written = folder, {}, []  # type: ignore[var-annotated]
        self._size = self._total = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if self._waiting and self._size + tensor.nbytes > _SHARD:
                self._flush()
            self._waiting[name] = tensor.cpu().contiguous()
            self._size += tensor.nbytes

    def finish(self) -> None:
        self._flush()
        count = len(self._written)
        if count == 1:
            (self._folder / "part-0.safetensors").rename(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._written):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self._folder / f"part-{number}.safetensors").rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        _write(
            self._folder / INDEX,
            {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))},
        )

    def _flush(self) -> None:
        file = self._folder / f"part-{len(self._written)}.safetensors"
        save_file(self._waiting, file, metadata={"format": "pt"})
        self._written.append(list(self._waiting))
        self._total += self._size
        self._waiting, self._size = {}, 0


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
