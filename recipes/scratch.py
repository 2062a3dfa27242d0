"""A model that has learned nothing, as a folder: random weights by a config, and a tokenizer learned from text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from recipes.common import fingerprint
from recipes.samples import cache_folder, resolve_sample

VERSION = 1  # of what is written: another one makes folders anew
END = "<|endoftext|>"
FIELDS = ("config", "tokenizer", "seed")
TOKENIZER_FIELDS = ("path", "text", "vocab_size", "bytes")


def scratch_folder(scratch: Mapping[str, Any]) -> Path:
    """The folder of an untrained model, made on the first call and kept in the cache.

    Args:
        scratch: config, fields of a transformers config with its model_type, without the vocabulary's; tokenizer, the
            path of one, or text (JSON lines or text files) to learn one from with vocab_size and how many bytes
            to read; seed, of the weights.

    Raises:
        ValueError: for an unknown or missing field, and text that is missing.
    """
    scratch = OmegaConf.to_container(scratch, resolve=True) if OmegaConf.is_config(scratch) else scratch
    _only(scratch, FIELDS, "model.scratch")
    _only(scratch["tokenizer"], TOKENIZER_FIELDS, "model.scratch.tokenizer")
    config = dict(scratch["config"])
    if "model_type" not in config:
        raise ValueError("model.scratch.config has no model_type, as llama")

    def make(folder: Path) -> None:
        tokenizer = scratch_tokenizer(scratch["tokenizer"])
        ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
        torch.manual_seed(scratch["seed"])
        whole = AutoConfig.for_model(**config, vocab_size=len(tokenizer), **ends)
        AutoModelForCausalLM.from_config(whole, dtype=torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return _kept("models", [VERSION, scratch["seed"], config, dict(scratch["tokenizer"])], make)


def scratch_tokenizer(config: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer in `path`; or a byte-level BPE (arXiv 1508.07909) learned from `text`."""
    if config["path"] is not None:
        return AutoTokenizer.from_pretrained(resolve_sample(config["path"]))

    def make(folder: Path) -> None:
        files = [Path(resolve_sample(path)).expanduser() for path in config["text"]]
        _learned(_texts(files, config["bytes"]), config["vocab_size"]).save_pretrained(folder)

    return AutoTokenizer.from_pretrained(_kept("tokenizers", [VERSION, dict(config)], make))


def _learned(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


def _texts(files: Sequence[Path], size: int) -> Iterator[str]:
    """Up to `size` bytes of text, an equal share of each file, from its beginning."""
    for file in files:
        if not file.is_file():
            raise ValueError(f"model.scratch.tokenizer.text: there is no file {file}")
        read = 0
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                text = json.loads(line)["text"] if file.suffix == ".jsonl" else line
                yield text
                read += len(text.encode())
                if read > size // len(files):
                    break


def _kept(kind: str, identity: Any, make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills, from the cache where it was made before; it appears whole or not at all."""
    folder = cache_folder() / kind / fingerprint(identity)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                make(partial)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def _only(given: Mapping[str, Any], fields: Sequence[str], name: str) -> None:
    if set(given) != set(fields):
        raise ValueError(f"{name} has the fields {', '.join(given)}; it needs {', '.join(fields)}")
