"""`attnzoo.convert`: a stock checkpoint with fewer KV heads, from a folder or from a model in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, overload

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
from attnzoo.conversion.hybrid import Layers
from attnzoo.conversion.kept import KeptLayers
from attnzoo.conversion.plan import Plan, make_plan
from attnzoo.conversion.regress import STEPS
from attnzoo.conversion.shards import FLOATS, Entry, Shard
from attnzoo.hf.auto import SwappedModel
from attnzoo.hf.calibration_convert import convert_on_text, key_of
from attnzoo.hf.calibration_progress import progress_bar
from attnzoo.hf.calibration_text import Text, token_rows
from attnzoo.hf.hybrid_convert import convert_hybrid, wants_hybrid
from attnzoo.hf.latent_convert import convert_latent, wants_latent
from attnzoo.hf.likeness import match
from attnzoo.specs import Spec

Report = Callable[[Damage], None]


@overload
def convert(
    source: str | Path,
    spec: Spec | Sequence[Spec],
    *,
    layers: Layers | None = ...,
    method: str = ...,
    calibration: Text | None = ...,
    out: str | Path,
    overwrite: bool = ...,
    seed: int = ...,
    held_out: Text | None = ...,
    samples: int = ...,
    sample_length: int = ...,
    grouping: Grouping = ...,
    steps: int = ...,
    report: Report | None = ...,
) -> Path: ...


@overload
def convert(
    source: PreTrainedModel,
    spec: Spec | Sequence[Spec],
    *,
    layers: Layers | None = ...,
    method: str = ...,
    calibration: Text | None = ...,
    out: str | Path | None = ...,
    overwrite: bool = ...,
    seed: int = ...,
    held_out: Text | None = ...,
    samples: int = ...,
    sample_length: int = ...,
    grouping: Grouping = ...,
    steps: int = ...,
    report: Report | None = ...,
) -> PreTrainedModel: ...


def convert(
    source: str | Path | PreTrainedModel,
    spec: Spec | Sequence[Spec],
    *,
    layers: Layers | None = None,
    method: str = "auto",
    calibration: Text | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    held_out: Text | None = None,
    samples: int = 64,
    sample_length: int = 512,
    grouping: Grouping = "order",
    steps: int = STEPS,
    report: Report | None = None,
) -> Path | PreTrainedModel:
    """A checkpoint with fewer KV heads that stock transformers loads (arXiv 2305.13245).

    The result is of the same family; of another where that holds it and the own does not (GPT-NeoX and GPT-J become
    Phi, GPT-2 with one KV head GPTBigCode); or comes with its code (OPT, BLOOM, T5, other GPT-2), for
    `trust_remote_code`. A folder is converted shard by shard, without loading the model; a model in memory stays as it
    is, and the result shares no memory with it. With calibration text one layer after the other is read, converted
    behind the converted ones before it, and run; on a GPU if there is one. A conversion of a folder that was killed
    goes on behind its last finished layer when it is called again.

    Args:
        source: a checkpoint folder with config.json and safetensors, or a transformers model.
        spec: a GQA, or a list of equal ones, one a layer; or an MLA, see `attnzoo.hf.latent_convert.convert_latent`; or
            a GQA with a mask or a Linear for some layers, or a list, see `attnzoo.hf.hybrid_convert.convert_hybrid`.
        layers: which layers get a mask or linear attention: how many, or a `KVBudget`, chosen by measured damage; or
            their numbers; None: all.
        method: `mean`, `first` or `random`, or with calibration text `svd`, `aligned`, `refit` or `regress`; "auto" is
            `svd` with calibration text and `mean` without.
        calibration: text to convert by: token ids `[rows, S]`; or for a folder, whose tokenizer reads them, texts, or
            the path of a text file or of a folder of them.
        out: the folder to write; needed for a folder. It appears whole or not at all.
        overwrite: replace `out` if it is a checkpoint, once the new one is complete.
        seed: what `random` draws from, and the order of `regress`'s batches.
        held_out: text of the same kinds on which the damage is measured; None: the calibration text.
        samples, sample_length: how many pieces of how many tokens are taken from texts.
        grouping: "order" merges neighbours, "similarity" those heads that calibration text shows to be alike.
        steps: of gradient descent in each layer, for `regress` and a Linear's feature maps.
        report: called with the `Damage`, if there is text to measure it on.

    Returns:
        The path of `out` for a folder; for a model, a new one in the same dtype and mode, on the same device.

    Raises:
        ValueError: for anything wrong with the source or the request, before anything is written; `Refusal` where no
            stock class holds the result, saying what could.
    """
    if wants_hybrid(spec, layers):
        return convert_hybrid(
            source,
            spec,
            layers,
            method=method,
            calibration=calibration,
            out=out,
            overwrite=overwrite,
            seed=seed,
            held_out=held_out,
            samples=samples,
            sample_length=sample_length,
            steps=steps,
            report=report,
        )
    if wants_latent(spec):
        return convert_latent(
            source,
            spec,
            method=method,
            calibration=calibration,
            out=out,
            overwrite=overwrite,
            held_out=held_out,
            samples=samples,
            sample_length=sample_length,
            steps=steps,
            report=report,
        )
    if method == "auto":
        method = "mean" if calibration is None else "svd"
    check_calibrated(method, calibrated=calibration is not None)
    if grouping != "order" and calibration is None:
        raise ConversionError(f"grouping {grouping!r} needs calibration text and got none; pass calibration=")
    settings = _Settings(method, seed, grouping, steps, samples, sample_length, report)
    if isinstance(source, str | Path):
        if out is None:
            raise ValueError(f"out must name the folder to write when the source is a folder ({source}); got None")
        if calibration is None and held_out is None:
            return convert_checkpoint(source, spec, out, method=method, seed=seed, overwrite=overwrite)
        return _convert_folder(source, spec, out, calibration, held_out, settings, overwrite)
    if not isinstance(source, PreTrainedModel):
        raise ValueError(f"source must be a checkpoint folder or a transformers model; got {type(source).__name__}")
    if out is not None:
        check_free(out, overwrite=overwrite)
    model = _convert_model(source, spec, calibration, held_out, settings)
    if out is not None:
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        with whole_folder(out, overwrite=overwrite, size=size) as folder:
            model.save_pretrained(folder)
    return model


@dataclass(frozen=True)
class _Settings:
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


def _convert_folder(
    source: str | Path,
    spec: Spec | Sequence[Spec],
    out: str | Path,
    calibration: Text | None,
    held_out: Text | None,
    settings: _Settings,
    overwrite: bool,
) -> Path:
    checkpoint = read_checkpoint(source, spec)
    plan, config = checkpoint.plan, checkpoint.config
    out = check_out(checkpoint, out, overwrite=overwrite)
    learned = settings.rows(calibration, checkpoint.folder, "calibration")
    judged = settings.rows(held_out, checkpoint.folder, "held_out")
    method = settings.merge(plan, config)
    files = [checkpoint.folder / shard.name for shard in checkpoint.shards]
    kept = KeptLayers(out, key_of(plan, config, method, learned, files))
    try:
        with progress_bar(f"{settings.method}: {checkpoint.folder.name}") as progress:
            damage = convert_on_text(
                plan,
                config,
                checkpoint.weights,
                method,
                learned,
                judged,
                finished=kept.get,
                keep=kept.put,
                judge=settings.report is not None,
                spill=kept.folder,
                progress=progress,
            )
        record = settings.record(learned)
        write_checkpoint(checkpoint, out, lambda layer, _: kept.layer(layer.number), record=record, overwrite=overwrite)
    except ConversionError:  # it would come again
        kept.remove()
        raise
    kept.remove()
    settings.told(damage)
    return out


def _convert_model(
    model: PreTrainedModel,
    spec: Spec | Sequence[Spec],
    calibration: Text | None,
    held_out: Text | None,
    settings: _Settings,
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
    learned = settings.rows(calibration, None, "calibration")
    converted = dict(_converted(plan, config, state, learned, settings.rows(held_out, None, "held_out"), settings))

    new_config = recorded_config(plan, config, name, settings.record(learned))
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
    settings: _Settings,
) -> Iterator[tuple[str, Tensor]]:
    """The new model's tensors, none of which shares memory with the old one's."""
    layers: dict[int, Mapping[str, Tensor]] = {}
    if calibration is not None or held_out is not None:
        method = settings.merge(plan, config)
        with progress_bar(settings.method) as progress:
            damage = convert_on_text(
                plan,
                config,
                state,
                method,
                calibration,
                held_out,
                finished=lambda number: None,
                keep=layers.__setitem__,
                judge=settings.report is not None,
                progress=progress,
            )
        settings.told(damage)
    for layer in plan.layers:
        new = layers.get(layer.number)
        if new is None:
            tensors = {inner: state[name] for inner, name in layer.sources.items()}
            new = plan.convert(layer, tensors, settings.method, settings.seed)
        for name, tensor in new.items():
            yield name, tensor.clone()
    for name, move in plan.moves.items():
        yield name, move.make(*(state[source] for source in move.sources)).clone()


def _entry(tensor: Tensor) -> Entry:
    words = {dtype: word for word, dtype in FLOATS.items()}
    return Entry(words.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), tensor.nbytes)
