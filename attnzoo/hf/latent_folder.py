"""A checkpoint folder to a stock deepseek_v3 folder, with one layer in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from attnzoo.conversion import ConversionError
from attnzoo.conversion.checkpoint import _files, _read, _source
from attnzoo.conversion.damage import Damage
from attnzoo.conversion.families import family_for
from attnzoo.conversion.folders import check_free, whole_folder
from attnzoo.conversion.latent import LatentWeights
from attnzoo.conversion.latent.stock import check_held
from attnzoo.conversion.shards import INDEX, read_json, read_shards
from attnzoo.hf.latent_plan import LatentPlan, best_device, method_name, plan_latent, run_latent
from attnzoo.hf.latent_stock import Biases, deepseek_config, deepseek_tensors
from attnzoo.hf.plan import one_a_layer
from attnzoo.specs import MLA, Spec

_SHARD = 1 << 30  # bytes of a file of the result, and so of what waits in memory


def convert_latent_folder(
    source: str | Path,
    spec: Spec | Sequence[Spec],
    out: str | Path,
    calibration: Tensor | None = None,
    held_out: Tensor | None = None,
    *,
    overwrite: bool = False,
    **fitting: Any,
) -> tuple[Path, Damage | None]:
    """A checkpoint folder as a stock deepseek_v3 folder, with one layer in memory at a time; and the damage.

    Args:
        source: config.json and safetensors.
        spec: an MLA, or a list of equal ones.
        out: the folder to write; it appears whole or not at all.
        calibration: token ids `[rows, S]` without padding; None: by the weights alone.
        held_out: token ids of other text, to measure the damage on.
        overwrite: replace `out` if it is a checkpoint.
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
    _check_names(folder, config, files)
    plan = plan_latent(config, files, spec, calibration, best_device())
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

        damage = run_latent(plan, calibration, held_out, keep, **fitting)
        for name in files:
            if name not in attention:
                shards.add({name: files[name]})
        shards.finish()
        record = {
            "spec": plan.specs[0].to_dict(),
            "method": method_name(**fitting),
            "source": config.get("_name_or_path") or folder.name,
        }
        if "attnzoo" in config:
            record["before"] = config["attnzoo"]
        new = deepseek_config(plan.original.model, plan.original.model.config.to_dict() | config, plan.specs[0], biases)
        _write(target / "config.json", {**new, "attnzoo": record})
        for path in carried:
            (target / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / path, target / path)
    return out, damage


def _check_names(folder: Path, config: dict[str, Any], names: Mapping[str, Tensor]) -> None:
    stem = family_for(config["model_type"]).attention_path(0)
    if f"{stem}.o_proj.weight" not in names:
        raise ConversionError(
            f"{folder} has no tensor {stem}.o_proj.weight; it must be saved from a causal language model, not from the "
            "base model alone"
        )


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
