"""The model in which some layers are changed: stock where a class holds it, else swapped; and its folder."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from attnzoo.conversion import Refusal
from attnzoo.conversion.checkpoint import _files
from attnzoo.conversion.folders import whole_folder
from attnzoo.conversion.transfer import is_learned
from attnzoo.conversion.windows import windowed_config
from attnzoo.hf.auto import SwappedModel
from attnzoo.hf.export import export
from attnzoo.hf.hybrid_request import Request
from attnzoo.hf.layers import SwappedAttention
from attnzoo.hf.likeness import match
from attnzoo.hf.linear import SwappedLinearAttention
from attnzoo.hf.swap import rebuild


def build(
    model: PreTrainedModel, request: Request, layers: Sequence[int], trained: Sequence[nn.Module]
) -> PreTrainedModel:
    """A new model that shares no memory with `model`, in its dtype and mode and on its device.

    Args:
        model: the original.
        request: what to do.
        layers: the layers to change.
        trained: every layer's attention, changed; what a linear one has learned is copied out of it.
    """
    new = copy.deepcopy(model)
    rebuild(new, request.chosen(layers))
    attentions = [new.get_submodule(request.family.attention_path(number)) for number in range(request.count)]
    for number in layers:
        if isinstance(attentions[number], SwappedLinearAttention):
            learned = {name: tensor for name, tensor in trained[number].state_dict().items() if is_learned(name)}
            attentions[number].load_state_dict(learned, strict=False)
    if all(isinstance(attention, SwappedAttention) for attention in attentions):
        try:
            config = windowed_config(model.config.to_dict(), [attention.mask for attention in attentions])  # type: ignore[misc]
        except Refusal:
            return new
        return _stock(model, config, request, layers)
    return new


def write(model: PreTrainedModel, out: str | Path, source: Path | None, *, overwrite: bool) -> Path:
    """Write a model that `build` made; with the tokenizer and licence files of the checkpoint that it was made from."""
    if isinstance(model, SwappedModel):
        path = export(model, out, overwrite=overwrite)
        _carry(source, path)
        return path
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    with whole_folder(out, overwrite=overwrite, size=size) as folder:
        model.save_pretrained(folder)
        _carry(source, folder)
    return Path(out).expanduser().resolve()


def _stock(model: PreTrainedModel, config: dict[str, Any], request: Request, layers: Sequence[int]) -> PreTrainedModel:
    """The same weights in the stock class that holds the windows, with a record of where they came from."""
    model_type = config.pop("model_type")
    record = {
        "spec": next(request.specs[number] for number in layers).to_dict(),
        "layers": list(layers),
        "source": config.get("_name_or_path") or type(model).__name__,
    }
    if "attnzoo" in config:
        record["before"] = config["attnzoo"]
    config_class = CONFIG_MAPPING[model_type]
    cls = type(model) if model_type == model.config.model_type else MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new: PreTrainedModel = cls.from_pretrained(
        None,
        config=config_class(**config, attnzoo=record),
        state_dict=state,
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
    )
    match(new, model, state)
    return new


def _carry(source: Path | None, out: Path) -> None:
    for path in _files(source) if source is not None else ():
        (out / path).parent.mkdir(exist_ok=True)
        if not (out / path).exists():
            shutil.copyfile(source / path, out / path)  # type: ignore[operator]
