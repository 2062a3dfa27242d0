"""Models and tokenizers by the fields of conf/model: a sample, a local folder or a hub id."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from recipes.samples import resolve_sample
from recipes.scratch import scratch_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}


def load_model(config: Mapping[str, Any], *, weights: bool = True) -> PreTrainedModel:
    """The causal language model of a conf/model group, on the CPU, in `dtype` and with its `attn_implementation`.

    A model whose attention no stock class holds is one of attnzoo's, with attnzoo's implementation. Without `weights`
    it is on the meta device, and no weight is read.

    Raises ValueError for a dtype that is none, and for a path that is neither a folder with a model nor a hub id.
    """
    if config["dtype"] not in DTYPES:
        raise ValueError(f"model.dtype is {config['dtype']!r}; allowed are {', '.join(DTYPES)}")
    import attnzoo.hf  # noqa: F401  (registers "attnzoo", and the models that attnzoo made)

    path, implementation = model_path(config), config["attn_implementation"]
    if _is_swapped(path):
        implementation = "attnzoo"  # the only one that their layers take
    options = {
        "dtype": DTYPES[config["dtype"]],
        "attn_implementation": implementation,
        "trust_remote_code": config["trust_remote_code"],
    }
    if weights:
        return AutoModelForCausalLM.from_pretrained(path, **options)
    kind = AutoConfig.from_pretrained(path, trust_remote_code=config["trust_remote_code"])
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(kind, **options)


def load_tokenizer(config: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model."""
    return AutoTokenizer.from_pretrained(model_path(config), trust_remote_code=config["trust_remote_code"])


def model_path(config: Mapping[str, Any]) -> str:
    """A local folder that holds a config.json, or a hub id; `sample:NAME` becomes that sample's folder.

    Without a path, the untrained model that `scratch` describes.
    """
    if config["path"] is None and config.get("scratch"):
        return str(scratch_folder(config["scratch"]))
    path = resolve_sample(str(config["path"]))
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"model.path is {path!r}, a folder without config.json: not a Hugging Face model")
        return str(folder)
    if folder.is_absolute() or path.count("/") > 1 or path.startswith((".", "~")):
        raise ValueError(f"model.path is {path!r}: there is no such folder")
    return path


def _is_swapped(path: str) -> bool:
    """Whether a local folder holds a model that `attnzoo.swap` made and no stock class holds."""
    file = Path(path) / "config.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["model_type"].startswith("attnzoo_")
