"""Models and tokenizers by the fields of conf/model: a sample, a local folder or a hub id."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from recipes.samples import resolve_sample

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}


def load_model(config: Mapping[str, Any]) -> PreTrainedModel:
    """The causal language model of a conf/model group, on the CPU, in `dtype` and with its `attn_implementation`.

    Raises ValueError for a dtype that is none, and for a path that is neither a folder with a model nor a hub id.
    """
    if config["dtype"] not in DTYPES:
        raise ValueError(f"model.dtype is {config['dtype']!r}; allowed are {', '.join(DTYPES)}")
    if config["attn_implementation"] == "attnzoo":
        import attnzoo.hf  # noqa: F401  (registers the name)
    return AutoModelForCausalLM.from_pretrained(
        model_path(config),
        dtype=DTYPES[config["dtype"]],
        attn_implementation=config["attn_implementation"],
        trust_remote_code=config["trust_remote_code"],
    )


def load_tokenizer(config: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model."""
    return AutoTokenizer.from_pretrained(model_path(config), trust_remote_code=config["trust_remote_code"])


def model_path(config: Mapping[str, Any]) -> str:
    """A local folder that holds a config.json, or a hub id; `sample:NAME` becomes that sample's folder."""
    path = resolve_sample(str(config["path"]))
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"model.path is {path!r}, a folder without config.json: not a Hugging Face model")
        return str(folder)
    if folder.is_absolute() or path.count("/") > 1 or path.startswith((".", "~")):
        raise ValueError(f"model.path is {path!r}: there is no such folder")
    return path
