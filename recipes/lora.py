"""LoRA adapters (arXiv 2106.09685) by `peft`, put into the model itself, so that it stays the class that it is."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from recipes.attentions import attention_modules

FIELDS = {"rank": 16, "alpha": 32, "dropout": 0.0, "targets": None}  # and what they are where a config leaves them out


def check_lora(config: Mapping[str, Any]) -> None:
    """ValueError for a field that there is not or a bad value, ImportError without peft."""
    unknown = sorted(set(config) - set(FIELDS))
    if unknown:
        raise ValueError(f"lora.{unknown[0]} is no field; allowed are {', '.join(FIELDS)}")
    config = {**FIELDS, **config}
    if not isinstance(config["rank"], int) or config["rank"] < 1:
        raise ValueError(f"lora.rank must be a whole number of at least 1, got {config['rank']!r}")
    if find_spec("peft") is None:
        raise ImportError('lora needs peft: pip install "attnzoo[lora]"')


def add_lora(model: PreTrainedModel, config: Mapping[str, Any], *, seed: int) -> None:
    """Puts adapters beside linear layers, in place; they change nothing at first.

    Args:
        model: the student.
        config: rank; alpha, the adapters' outputs count alpha / rank times; dropout of their inputs; targets, names of
            linear layers, as [q_proj, o_proj], or null for all of the attention's.
        seed: of the adapters' weights.

    Raises:
        ValueError: see `check_lora`; and for targets that are nowhere.
    """
    from peft import LoraConfig, inject_adapter_in_model

    check_lora(config)
    config = {**FIELDS, **config}
    names = list(config["targets"] or _attention_linears(model))
    made = LoraConfig(
        r=config["rank"], lora_alpha=config["alpha"], lora_dropout=config["dropout"], target_modules=names, bias="none"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(made, model)


def merge_lora(model: PreTrainedModel) -> None:
    """Adds the adapters to the weights beside them and takes them out, in place; does nothing where there are none."""
    adapted = [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]
    for name, module in adapted:
        module.merge(safe_merge=True)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def _attention_linears(model: PreTrainedModel) -> list[str]:
    """The names of all linear layers in attention modules, in a fixed order."""
    from transformers.pytorch_utils import Conv1D

    found = {
        name: None
        for module in attention_modules(model)
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear | Conv1D)
    }
    return list(found)
