"""A checkpoint folder to a checkpoint folder, a layer at a time: the model is never loaded."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from attnzoo.conversion.errors import ConversionError
from attnzoo.conversion.folders import check_free, whole_folder
from attnzoo.conversion.merge import check_method
from attnzoo.conversion.plan import Layer, Plan, make_plan
from attnzoo.conversion.shards import GGUF, INDEX, Shard, ShardWriter, gguf_message, read_json, read_shards
from attnzoo.specs import Spec

# Tokenizers, chat templates, generation and preprocessor configs, licences: what is not weights and not about them.
_CARRIED = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".bpe"}
_BY_NAME = ("license", "licence", "notice", "use_policy", "tokenizer")
_LEFT = {"config.json", "trainer_state.json", "adapter_config.json"}
_TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that can be converted: what it holds, and what it will be."""

    folder: Path
    config: dict[str, Any]
    shards: list[Shard]
    index: dict[str, Any] | None
    plan: Plan

    @property
    def weights(self) -> "Weights":
        """All its tensors, read when they are asked for."""
        plan = self.plan
        loose = {name for shard in self.shards for name in shard.entries if plan.family.locate(name) is not None}
        loose -= {name for layer in plan.layers for name in layer.weights.values()}
        return Weights({name: self.folder / shard.name for shard in self.shards for name in shard.entries}, loose)


class Weights(Mapping[str, Tensor]):
    """Tensors by name, read from their files when they are asked for.

    Args:
        where: the file of each.
        loose: what may hold infinities: causal masks and frequency tables, where they have a meaning.
    """

    def __init__(self, where: Mapping[str, Path], loose: Set[str] = frozenset()) -> None:
        self.where, self._loose = where, loose

    def __getitem__(self, name: str) -> Tensor:
        return _read(self.where[name], name, finite=name not in self._loose)

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


ConvertLayer = Callable[
    [Layer, dict[str, Tensor]], Mapping[str, Tensor]
]  # tensors by `layer.sources`' words -> by name


def convert_checkpoint(
    source: str | Path,
    spec: Spec | Sequence[Spec],
    out: str | Path,
    *,
    method: str = "mean",
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Convert the checkpoint folder `source` to fewer KV heads (arXiv 2305.13245) and write it as the folder `out`.

    The result is a checkpoint that stock transformers loads: of the same family; of another where that holds it and the
    own does not (GPT-NeoX and GPT-J become Phi, GPT-2 with one KV head GPTBigCode); or with its code beside the weights
    (OPT, BLOOM, T5, other GPT-2), which `trust_remote_code=True` loads. Dtypes, biases, tied embeddings, sharding,
    tokenizer files, chat templates, the generation config and licence files are carried over, other code in the folder
    is not; config.json says under "attnzoo" where the weights came from. Memory holds one layer's attention or one
    other tensor at a time.

    `out` appears whole or not at all, also when the process is killed; see `whole_folder`.

    Args:
        source: folder with config.json and safetensors, single or sharded with an index.
        spec: a GQA, or a list of equal ones, one a layer.
        out: a folder that does not exist yet.
        method: `mean`, `first` or `random`; those that need text are `attnzoo.convert`'s.
        seed: what `random` draws from.
        overwrite: replace an existing checkpoint folder, once the new one is complete.

    Returns:
        The resolved path of `out`.

    Raises:
        ConversionError: anything wrong with the checkpoint, the request, or the space on the disk; nothing is written.
            UnknownFamily and Refusal are two kinds of it.
    """
    check_method(method)
    checkpoint = read_checkpoint(source, spec)
    out = check_out(checkpoint, out, overwrite=overwrite)
    record = {"method": method, "seed": seed}
    return write_checkpoint(
        checkpoint,
        out,
        lambda layer, tensors: checkpoint.plan.convert(layer, tensors, method, seed),
        record=record,
        overwrite=overwrite,
    )


def read_checkpoint(source: str | Path, spec: Spec | Sequence[Spec]) -> Checkpoint:
    """A folder's config and headers, and the plan of its conversion; raises ConversionError for what they can tell."""
    folder = _source(source)
    config = read_json(folder / "config.json")
    shards, index = read_shards(folder)
    return Checkpoint(folder, config, shards, index, make_plan(folder, config, shards, spec))


def check_out(checkpoint: Checkpoint, out: str | Path, *, overwrite: bool) -> Path:
    """The resolved path of the output; raises ConversionError where it may not be written."""
    out = check_free(out, overwrite=overwrite)
    if out == checkpoint.folder or out in checkpoint.folder.parents:
        raise ConversionError(f"out {out} is or contains the source {checkpoint.folder}; choose another folder")
    return out


def write_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    convert: ConvertLayer,
    *,
    record: Mapping[str, Any],
    overwrite: bool,
    extra: Mapping[str, Path] | None = None,
) -> Path:
    """Write the converted checkpoint as the folder `out`, whole or not at all, and return it.

    Args:
        convert: gives a layer's new attention weights; called twice for one that lies in two shards.
        record: what config.json says besides the spec and the source.
        extra: more files to put there, by their names in `out`.
    """
    plan, folder, weights = checkpoint.plan, checkpoint.folder, checkpoint.weights
    files = {folder / path: path for path in _files(folder)}
    files |= {path: Path(name) for name, path in (extra or {}).items()}
    if plan.holder.code is not None:
        files[plan.holder.code.path] = Path(plan.holder.code.file)
    headers = sum(200 * len(shard.entries) + 4096 for shard in plan.shards)
    size = sum(shard.nbytes for shard in plan.shards) + headers + sum(path.stat().st_size for path in files)
    with whole_folder(out, overwrite=overwrite, size=size) as new:
        for shard in plan.shards:
            _write_shard(plan, shard, weights, new, convert)
        if checkpoint.index is not None:
            _write_json(new / INDEX, _new_index(checkpoint.index, checkpoint.shards, plan.shards))
        _write_json(new / "config.json", recorded_config(plan, checkpoint.config, folder, record))
        for path, inside in files.items():
            (new / inside).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, new / inside)
    return out


def _source(source: str | Path) -> Path:
    path = Path(source).expanduser().resolve()
    if path.suffix == GGUF and path.is_file():
        raise ConversionError(gguf_message(path))
    if not path.is_dir():
        raise ConversionError(f"source {source} is not a folder; it must be a checkpoint folder with a config.json")
    return path


def _files(folder: Path) -> list[Path]:
    """What comes along as it is: paths inside the folder."""

    def carried(path: Path) -> bool:
        name = path.name.lower()
        known = path.suffix in _CARRIED or (name.startswith(_BY_NAME) and path.suffix != ".py")
        return path.is_file() and known and name not in _LEFT and not name.endswith(".index.json")

    templates = folder / _TEMPLATES
    found = filter(carried, [*folder.iterdir(), *(templates.iterdir() if templates.is_dir() else ())])
    return sorted(path.relative_to(folder) for path in found)


def _write_shard(plan: Plan, shard: Shard, weights: Weights, new: Path, convert: ConvertLayer) -> None:
    with ShardWriter(new, shard) as writer:
        done = set()
        for layer in plan.layers:
            if not any(weights.where[name].name == shard.name for name in layer.weights.values()):
                continue
            # A layer whose weights lie in two shards is worked out twice, which costs less than keeping it.
            tensors = {inner: weights[name] for inner, name in layer.sources.items()}
            for name, tensor in convert(layer, tensors).items():
                if name in shard.entries:
                    writer.write(name, tensor)
                    done.add(name)
        for name in shard.entries.keys() - done:
            move = plan.moves[name]
            writer.write(name, move.make(*(weights[source] for source in move.sources)))


def _read(path: Path, name: str, *, finite: bool = True) -> Tensor:
    # Opened anew for every tensor: an open file would keep in memory whatever was read from it before.
    with safe_open(path, framework="pt") as file:
        tensor = file.get_tensor(name)
    checkable = tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel()
    # The bounds pass NaN on, and need no copy, unlike isfinite of the whole.
    if finite and checkable and not all(bound.isfinite() for bound in torch.aminmax(tensor)):
        raise ConversionError(f"tensor {name} of {path} holds NaN or infinity")
    return tensor


def _new_index(index: dict[str, Any], old: list[Shard], new: list[Shard]) -> dict[str, Any]:
    metadata = dict(index.get("metadata") or {})
    metadata["total_size"] = sum(shard.nbytes for shard in new)
    # It may count more than the files hold, so only the change is known.
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += _numel(new) - _numel(old)
    weight_map = {name: shard.name for shard in new for name in shard.entries}
    return {**index, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def _numel(shards: list[Shard]) -> int:
    return sum(entry.numel for shard in shards for entry in shard.entries.values())


def recorded_config(plan: Plan, old: dict[str, Any], folder: Path, how: Mapping[str, Any]) -> dict[str, Any]:
    """The plan's config.json with a record, under "attnzoo", of where the weights came from; `old` is the source's.

    how: what else the record says: the method, the seed and so on.
    """
    config = dict(plan.config)
    code = config.pop("auto_map", None) or old.get("auto_map")
    if plan.holder.code is not None:
        config["auto_map"] = plan.holder.code.auto_map
    if code and plan.family.code is None:
        warnings.warn(
            f"{folder} comes with model code of its own ({', '.join(sorted(code))}); it is left behind, and the "
            f"result is of type {plan.holder.model_type}",
            stacklevel=3,
        )
    record = {
        "spec": plan.spec.to_dict(),
        **how,
        "source": old.get("_name_or_path") or folder.name,
    }
    if "attnzoo" in old:
        record["before"] = old["attnzoo"]
    return {**config, "attnzoo": record}


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
