"""`attnzoo.convert` to fewer KV heads: of a folder, shard by shard, or of a model in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from attnzoo.conversion import ConversionError, Refusal, convert_checkpoint
from attnzoo.conversion.checkpoint import check_out, read_checkpoint, recorded_config, write_checkpoint
from attnzoo.conversion.damage import Damage
from attnzoo.conversion.families.code import Code
from attnzoo.conversion.folders import check_free, whole_folder
from attnzoo.conversion.grouping import Grouping
from attnzoo.conversion.heads import MergeHeads, check_calibrated
from attnzoo.conversion.kept import KeptLayers
from attnzoo.conversion.plan import Plan, make_plan
from attnzoo.conversion.shards import FLOATS, Entry, Shard
from attnzoo.hf.auto import SwappedModel
from attnzoo.hf.calibration_convert import convert_on_text, key_of
from attnzoo.hf.calibration_progress import progress_bar
from attnzoo.hf.calibration_text import Text, token_rows
from attnzoo.hf.likeness import match
from attnzoo.specs import Spec

Report = Callable[[Damage], None]


@dataclass(frozen=True)
class Request:
    """How heads are to be merged; the fields as `attnzoo.convert`'s arguments of these names."""

    method: str
    seed: int
    grouping: Grouping
    steps: int
    samples: int
    sample_length: int
    report: Report | None

    def merge(self, plan: Plan, config: dict[str, Any]) -> MergeHeads:
        return MergeHeads(plan, config, self.method, seed=self.seed, grouping=self.grouping, steps=self.steps)

    def rows(self, text: Text | None, folder: Path | None, name: str) -> Tensor | None:
        return None if text is None else token_rows(text, folder, self.samples, self.sample_length, name=name)

    def record(self, calibration: Tensor | None) -> dict[str, Any]:
        record: dict[str, Any] = {"method": self.method, "seed": self.seed}
        if calibration is not None:
            record |= {"grouping": self.grouping, "calibration_tokens": calibration.numel()}
        return record

    def told(self, damage: Damage) -> None:
        if self.report is not None:
            self.report(damage)


def convert_heads(
    source: str | Path | PreTrainedModel,
    spec: Spec | Sequence[Spec],
    request: Request,
    *,
    calibration: Text | None,
    held_out: Text | None,
    out: str | Path | None,
    overwrite: bool,
) -> Path | PreTrainedModel:
    """`attnzoo.convert` to a GQA without a mask; arguments and errors as there."""
    check_calibrated(request.method, calibrated=calibration is not None)
    if request.grouping != "order" and calibration is None:
        raise ConversionError(f"grouping {request.grouping!r} needs calibration text and got none; pass calibration=")
    if isinstance(source, str | Path):
        if out is None:
            raise ValueError(f"out must name the folder to write when the source is a folder ({source}); got None")
        if calibration is None and held_out is None:
            return convert_checkpoint(source, spec, out, method=request.method, seed=request.seed, overwrite=overwrite)
        return _of_folder(source, spec, out, calibration, held_out, request, overwrite)
    if not isinstance(source, PreTrainedModel):
        raise ValueError(f"source must be a checkpoint folder or a transformers model; got {type(source).__name__}")
    if out is not None:
        check_free(out, overwrite=overwrite)
    model = _of_model(source, spec, calibration, held_out, request)
    if out is not None:
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        with whole_folder(out, overwrite=overwrite, size=size) as folder:
            model.save_pretrained(folder)
    return model


def _of_folder(
    source: str | Path,
    spec: Spec | Sequence[Spec],
    out: str | Path,
    calibration: Text | None,
    held_out: Text | None,
    request: Request,
    overwrite: bool,
) -> Path:
    checkpoint = read_checkpoint(source, spec)
    plan, config = checkpoint.plan, checkpoint.config
    out = check_out(checkpoint, out, overwrite=overwrite)
    learned = request.rows(calibration, checkpoint.folder, "calibration")
    judged = request.rows(held_out, checkpoint.folder, "held_out")
    method = request.merge(plan, config)
    files = [checkpoint.folder / shard.name for shard in checkpoint.shards]
    kept = KeptLayers(out, key_of(plan, config, method, learned, files))
    try:
        with progress_bar(f"{request.method}: {checkpoint.folder.name}") as progress:
            damage = convert_on_text(
                plan,
                config,
                checkpoint.weights,
                method,
                learned,
                judged,
                finished=kept.get,
                keep=kept.put,
                judge=request.report is not None,
                spill=kept.folder,
                progress=progress,
            )
        record = request.record(learned)
        write_checkpoint(checkpoint, out, lambda layer, _: kept.layer(layer.number), record=record, overwrite=overwrite)
    except ConversionError:  # it would come again
        kept.remove()
        raise
    kept.remove()
    request.told(damage)
    return out


def _of_model(
    model: PreTrainedModel,
    spec: Spec | Sequence[Spec],
    calibration: Text | None,
    held_out: Text | None,
    request: Request,
) -> PreTrainedModel:
    if isinstance(model, SwappedModel):
        raise Refusal("source is a swapped model that no stock class holds; convert the model that it was made from")
    state = model.state_dict()
    name = Path(type(model).__name__)  # stands where errors name a folder
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    shard = Shard(name.name, {key: _entry(tensor) for key, tensor in state.items()}, {})
    plan = make_plan(name, config, [shard], spec)
    for key, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel() and not all(b.isfinite() for b in torch.aminmax(tensor)):
            raise ConversionError(f"tensor {key} of {name} holds NaN or infinity")
    learned = request.rows(calibration, None, "calibration")
    converted = dict(_converted(plan, config, state, learned, request.rows(held_out, None, "held_out"), request))

    new_config = recorded_config(plan, config, name, request.record(learned))
    architecture = new_config["architectures"][0]
    model_type = new_config.pop("model_type")
    if architecture == type(model).__name__:
        cls, config_class = type(model), type(model.config)
    elif plan.holder.code is not None:
        cls, config_class = _classes(plan.holder.code, architecture)
    else:
        cls, config_class = getattr(transformers, architecture), CONFIG_MAPPING[model_type]
    new: PreTrainedModel = cls.from_pretrained(
        None,
        config=config_class(**new_config),
        state_dict=converted,
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
    )
    match(new, model, converted)
    return new


def _classes(code: Code, architecture: str) -> tuple[type[PreTrainedModel], type[PreTrainedConfig]]:
    """A model class of the code that lies beside the weights, and its config class; both are saved with that code."""
    module = import_module(code.module)
    cls, config_class = getattr(module, architecture), getattr(module, code.config)
    cls.register_for_auto_class(next(auto for auto, name in code.classes.values() if name == architecture))
    config_class.register_for_auto_class()
    return cls, config_class


def _converted(
    plan: Plan,
    config: dict[str, Any],
    state: dict[str, Tensor],
    calibration: Tensor | None,
    held_out: Tensor | None,
    request: Request,
) -> Iterator[tuple[str, Tensor]]:
    """The new model's tensors, none of which shares memory with the old one's."""
    layers: dict[int, Mapping[str, Tensor]] = {}
    if calibration is not None or held_out is not None:
        method = request.merge(plan, config)
        with progress_bar(request.method) as progress:
            damage = convert_on_text(
                plan,
                config,
                state,
                method,
                calibration,
                held_out,
                finished=lambda number: None,
                keep=layers.__setitem__,
                judge=request.report is not None,
                progress=progress,
            )
        request.told(damage)
    for layer in plan.layers:
        new = layers.get(layer.number)
        if new is None:
            tensors = {inner: state[name] for inner, name in layer.sources.items()}
            new = plan.convert(layer, tensors, request.method, request.seed)
        for name, tensor in new.items():
            yield name, tensor.clone()
    for name, move in plan.moves.items():
        yield name, move.make(*(state[source] for source in move.sources)).clone()


def _entry(tensor: Tensor) -> Entry:
    words = {dtype: word for word, dtype in FLOATS.items()}
    return Entry(words.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), tensor.nbytes)
