"""`attnzoo convert model.path=DIR attention.num_kv_heads=1 out=DIR`: one checkpoint folder into another."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from huggingface_hub import snapshot_download
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

import attnzoo
import attnzoo.hf
from attnzoo.conversion.damage import Damage
from attnzoo.conversion.hybrid import KVBudget, Layers
from attnzoo.specs import GQA, MLA, Linear, Spec, spec_from_dict
from recipes.balance import balance
from recipes.models import model_path
from recipes.samples import resolve_sample

log = logging.getLogger(__name__)

# What a conversion reads or carries over; nothing that would have to be unpickled.
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
NEEDS_NO_TEXT = ("mean", "first", "random")
TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "spiece")


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="convert")
def main(config: DictConfig) -> None:
    from recipes.damage import print_damages, write_damages

    OmegaConf.resolve(config)
    spec, out, source = read_spec(config.attention), Path(config.out).expanduser(), local_folder(config.model)
    damages: list[Damage] = []
    if config.compare and config.held_out is None:
        raise ValueError("held_out is null; to compare methods it has to name text on which all of them are judged")
    for method in config.compare or [None]:
        chosen = config.convert if method is None else {**config.convert, "method": method}
        folder = convert_folder(
            source,
            spec,
            out if method is None else out / method,
            chosen,
            overwrite=config.overwrite,
            held_out=config.held_out,
            damages=damages,
        )
        log.info("converted to %s: %s", spec, folder)
    if damages:
        write_damages(out, damages)
        print_damages(damages)
        log.info("written to %s", out / "damage.json")


def read_spec(config: DictConfig) -> Spec:
    """The spec that a conf/attention group names."""
    return spec_from_dict(OmegaConf.to_container(config, throw_on_missing=True))


def local_folder(model: Mapping[str, Any]) -> Path:
    """The folder of a conf/model group's checkpoint; a hub id is downloaded first."""
    path = model_path(model)
    if Path(path).is_dir():
        return Path(path)
    return Path(snapshot_download(path, allow_patterns=HUB_FILES))


def convert_folder(
    source: Path,
    spec: Spec,
    out: Path,
    convert: Mapping[str, Any],
    *,
    overwrite: bool = False,
    held_out: str | Sequence[str] | None = None,
    damages: list[Damage] | None = None,
) -> Path:
    """Converts the checkpoint in `source` into the folder `out`, as a conf/convert group says.

    What text was converted by, or is given as `held_out`, tells the damage, which is put behind `damages`.
    """
    options = {key: convert[key] for key in ("method", "seed", "samples", "sample_length", "grouping", "steps")}
    calibration = None if convert["method"] in NEEDS_NO_TEXT else read_texts(convert["calibration"])
    report = None if damages is None else damages.append
    return attnzoo.convert(
        source,
        spec,
        out=out,
        layers=read_layers(convert["layers"]),
        calibration=calibration,
        held_out=read_texts(held_out),
        overwrite=overwrite,
        report=report,
        **options,
    )


def read_layers(layers: int | Sequence[int] | Mapping[str, Any] | None) -> Layers | None:
    """What a config says of the layers to change: a number, a list, or the fields of a `KVBudget`."""
    if isinstance(layers, Mapping):
        return KVBudget(**layers)
    return layers if layers is None or isinstance(layers, int) else list(layers)


def read_texts(paths: str | Sequence[str] | None) -> list[str] | None:
    """The texts under one path or several; `sample:NAME` is the folder of that sample.

    Raises ValueError for a path without any.
    """
    from attnzoo.hf.calibration_text import read_files

    if paths is None:
        return None
    several = [paths] if isinstance(paths, str) else list(paths)
    return [text for path in several for text in read_files(Path(resolve_sample(path)).expanduser(), "calibration")]


def convert_to_train(source: Path, spec: Spec, out: Path, convert: Mapping[str, Any]) -> Path:
    """Converts the checkpoint in `source` into a folder whose weights an optimizer can work with.

    That is `convert_folder`'s, but for latent attention: deepseek_v3's latents are scaled far below what AdamW and
    bfloat16 work with, so the folder holds attnzoo's own layers, without a norm. `recipes.export` writes the stock one.
    """
    if isinstance(spec, GQA) and spec.mask is not None and spec.num_kv_heads is None and convert["layers"] is None:
        layers = AutoConfig.from_pretrained(source).get_text_config().num_hidden_layers
        convert = {
            **convert,
            "layers": list(range(layers)),
        }  # so that masks go in that no stock class has in all layers
    if not isinstance(spec, MLA):
        return convert_folder(source, spec, out, convert)
    from attnzoo.hf.calibration_text import token_rows

    check_method(spec, convert["method"])
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    if torch.cuda.is_available():
        model.to("cuda")
    texts = read_texts(convert["calibration"])
    rows = None
    if texts is not None:
        rows = token_rows(texts, source, convert["samples"], convert["sample_length"], name="convert.calibration")
    options = {"method": convert["method"], "steps": convert["steps"]}
    model = attnzoo.convert(model, spec, calibration=rows, **options)
    balance(model)
    attnzoo.hf.export(model, out)
    for file in source.iterdir():
        if file.is_file() and file.name.startswith(TOKENIZER) and not (out / file.name).exists():
            shutil.copyfile(file, out / file.name)
    return out


def check_method(spec: Spec, method: str) -> None:
    """ValueError for a method that merges heads and a spec that asks for something else."""
    merges = isinstance(spec, GQA) and spec.mask is None
    if not merges and method in NEEDS_NO_TEXT:
        raise ValueError(
            f"convert.method is {method!r}, which merges key/value heads, and attention.mechanism is "
            f"{spec.mechanism!r}{'' if isinstance(spec, MLA | Linear) else ' with a mask'}; take convert=auto"
        )


def changes_attention(source: Path, spec: Spec) -> bool:
    """Whether the checkpoint in `source` has another attention than `spec` names.

    Raises ValueError for one that cannot be trained: a deepseek_v3 folder that a conversion wrote.
    """
    from attnzoo.conversion.families import family_for

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] == "deepseek_v3" and config.get("attnzoo"):
        raise ValueError(
            f"model.path is {source}, which attnzoo wrote as deepseek_v3: its scaled-down latents are for use and not "
            "for training. Give the model that it was made from, and attention=mla"
        )
    if isinstance(spec, MLA | Linear):
        return True
    if spec.num_kv_heads is None and spec.mask is None:
        return False
    heads = family_for(config["model_type"]).geometry(config).num_kv_heads
    return spec.mask is not None or spec.num_kv_heads not in (None, heads)


if __name__ == "__main__":
    main()
