"""Which parameters train: `train` of a config or of a stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from transformers import PreTrainedModel

from recipes.attentions import attention_modules

PARTS = ("all", "layers", "attention", "lora")


def trained_names(model: PreTrainedModel, train: str | Sequence[str]) -> list[str]:
    """The names of the parameters that `train` means, as in `model.named_parameters()`.

    Args:
        model: the student. Weights that have LoRA adapters never train; their adapters do.
        train: "all"; "layers" for all but the embeddings and the output head, which keeps a short run on little text
            from bending what all other text needs; "attention" for the attention modules; "lora" for the adapters; or
            patterns such as "model.layers.*.mlp.*", each of which has to match a name.

    Raises:
        ValueError: for a pattern that matches nothing, and where nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters() if ".base_layer." not in name]
    if train == "layers":
        ends = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
        parameters = dict(model.named_parameters())
        names = [name for name in names if id(parameters[name]) not in ends]
    elif train == "attention":
        inside = {id(parameter) for module in attention_modules(model) for parameter in module.parameters()}
        names = [name for name, parameter in model.named_parameters() if id(parameter) in inside and name in set(names)]
    elif train == "lora":
        names = [name for name in names if ".lora_" in name]
    elif not isinstance(train, str):
        names = _matching(names, train)
    elif train != "all":
        raise ValueError(f"train must be one of {', '.join(PARTS)} or a list of patterns, got {train!r}")
    if not names:
        raise ValueError(f"train={train!r} leaves no parameter of the model to train")
    return names


def within_layers(model: PreTrainedModel, layers: Iterable[int], names: Sequence[str]) -> list[str]:
    """Those of `names` that are parameters of these layers' attention."""
    modules = attention_modules(model)
    inside = {id(parameter) for layer in layers for parameter in modules[layer].parameters()}
    parameters = dict(model.named_parameters())
    found = [name for name in names if id(parameters[name]) in inside]
    if not found:
        raise ValueError(
            "objective.layers with the teacher's inputs trains attention alone, and none of it is to train"
        )
    return found


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"train has the pattern {pattern!r}, which no parameter's name matches, as {names[-1]}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
