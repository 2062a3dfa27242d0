"""`attnzoo.convert`: a stock checkpoint with fewer KV heads, from a folder or from a model in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import overload

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from attnzoo.conversion import METHODS, ConversionError, Refusal, convert_checkpoint
from attnzoo.conversion.checkpoint import recorded_config
from attnzoo.conversion.families.code import Code
from attnzoo.conversion.folders import check_free, whole_folder
from attnzoo.conversion.merge import check_method
from attnzoo.conversion.plan import Plan, make_plan
from attnzoo.conversion.shards import FLOATS, Entry, Shard
from attnzoo.hf.auto import SwappedModel
from attnzoo.hf.latent_convert import convert_latent, wants_latent
from attnzoo.specs import Spec

_BEST = "mean"  # what method="auto" is


@overload
def convert(
    source: str | Path,
    spec: Spec | Sequence[Spec],
    *,
    method: str = ...,
    calibration: None = ...,
    out: str | Path,
    overwrite: bool = ...,
    seed: int = ...,
) -> Path: ...


@overload
def convert(
    source: PreTrainedModel,
    spec: Spec | Sequence[Spec],
    *,
    method: str = ...,
    calibration: None = ...,
    out: str | Path | None = ...,
    overwrite: bool = ...,
    seed: int = ...,
) -> PreTrainedModel: ...


def convert(
    source: str | Path | PreTrainedModel,
    spec: Spec | Sequence[Spec],
    *,
    method: str = "auto",
    calibration: object = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
) -> Path | PreTrainedModel:
    """A checkpoint with fewer KV heads that stock transformers loads (arXiv 2305.13245).

    The result is of the same family; of another where that holds it and the own does not (GPT-NeoX and GPT-J become
    Phi, GPT-2 with one KV head GPTBigCode); or comes with its code (OPT, BLOOM, T5, other
    GPT-2), for `trust_remote_code`. A folder is converted shard by shard, without loading the model; a model in memory
    stays as it is, and the result shares no memory with it.

    Args:
        source: a checkpoint folder with config.json and safetensors, or a transformers model.
        spec: a GQA, or a list of equal ones, one a layer; or an MLA, see `attnzoo.hf.latent_convert.convert_latent`.
        method: `mean`, `first` or `random`; "auto" is `mean`.
        calibration: None; no method needs data yet.
        out: the folder to write; needed for a folder. It appears whole or not at all.
        overwrite: replace `out` if it is a checkpoint, once the new one is complete.
        seed: what `random` draws from.

    Returns:
        The path of `out` for a folder; for a model, a new one in the same dtype and mode, on the same device.

    Raises:
        ValueError: for anything wrong with the source or the request, before anything is written; `Refusal` where no
            stock class holds the result, saying what could.
    """
    if wants_latent(spec):
        return convert_latent(source, spec, method=method, calibration=calibration, out=out, overwrite=overwrite)
    if calibration is not None:
        raise ValueError(
            f"calibration must be None: none of the methods {', '.join(METHODS)} uses data; "
            f"got {type(calibration).__name__}"
        )
    method = _BEST if method == "auto" else method
    check_method(method)
    if isinstance(source, str | Path):
        if out is None:
            raise ValueError(f"out must name the folder to write when the source is a folder ({source}); got None")
        return convert_checkpoint(source, spec, out, method=method, seed=seed, overwrite=overwrite)
    if not isinstance(source, PreTrainedModel):
        raise ValueError(f"source must be a checkpoint folder or a transformers model; got {type(source).__name__}")
    if out is not None:
        check_free(out, overwrite=overwrite)
    model = _convert_model(source, spec, method, seed)
    if out is not None:
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        with whole_folder(out, overwrite=overwrite, size=size) as folder:
            model.save_pretrained(folder)
    return model


def _convert_model(model: PreTrainedModel, spec: Spec | Sequence[Spec], method: str, seed: int) -> PreTrainedModel:
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
    converted = dict(_converted(plan, state, method, seed))

    new_config = recorded_config(plan, config, name, {"method": method, "seed": seed})
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
    _match(new, model, converted)
    return new


def _classes(code: Code, architecture: str) -> tuple[type[PreTrainedModel], type[PreTrainedConfig]]:
    """A model class of the code that lies beside the weights, and its config class; both are saved with that code."""
    module = import_module(code.module)
    cls, config_class = getattr(module, architecture), getattr(module, code.config)
    cls.register_for_auto_class(next(auto for auto, name in code.classes.values() if name == architecture))
    config_class.register_for_auto_class()
    return cls, config_class


def _converted(plan: Plan, state: dict[str, Tensor], method: str, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The new model's tensors, none of which shares memory with the old one's."""
    for layer in plan.layers:
        tensors = {inner: state[name] for inner, name in layer.sources.items()}
        for name, tensor in plan.convert(layer, tensors, method, seed).items():
            yield name, tensor.clone()
    for name, move in plan.moves.items():
        yield name, move.make(*(state[source] for source in move.sources)).clone()


def _match(new: PreTrainedModel, old: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Give the new model the old one's device, dtypes, mode, `requires_grad` and generation config."""
    new.to(old.device)  # type: ignore[arg-type]
    flags = {name: parameter.requires_grad for name, parameter in old.named_parameters()}
    for name, parameter in new.named_parameters():
        if name in state:  # models may keep some weights in another dtype than the rest
            parameter.data = parameter.data.to(state[name].dtype)
        parameter.requires_grad_(flags.get(name, True))
    new.train(old.training)
    if old.can_generate():
        new.generation_config = copy.deepcopy(old.generation_config)


def _entry(tensor: Tensor) -> Entry:
    words = {dtype: word for word, dtype in FLOATS.items()}
    return Entry(words.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), tensor.nbytes)
