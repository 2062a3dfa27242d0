"""`attnzoo convert model.path=DIR attention.num_kv_heads=1 out=DIR`: one checkpoint folder into another."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from huggingface_hub import snapshot_download
from omegaconf import DictConfig, OmegaConf

import attnzoo
from attnzoo.specs import Spec, spec_from_dict
from recipes.models import model_path

log = logging.getLogger(__name__)

# What a conversion reads or carries over; nothing that would have to be unpickled.
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="convert")
def main(config: DictConfig) -> None:
    OmegaConf.resolve(config)
    spec = read_spec(config.attention)
    folder = convert_folder(
        local_folder(config.model), spec, Path(config.out).expanduser(), config.convert, overwrite=config.overwrite
    )
    log.info("converted to %s: %s", spec, folder)


def read_spec(config: DictConfig) -> Spec:
    """The spec that a conf/attention group names."""
    return spec_from_dict(OmegaConf.to_container(config, throw_on_missing=True))


def local_folder(model: Mapping[str, Any]) -> Path:
    """The folder of a conf/model group's checkpoint; a hub id is downloaded first."""
    path = model_path(model)
    if Path(path).is_dir():
        return Path(path)
    return Path(snapshot_download(path, allow_patterns=HUB_FILES))


def convert_folder(source: Path, spec: Spec, out: Path, convert: Mapping[str, Any], *, overwrite: bool = False) -> Path:
    """Converts the checkpoint in `source` into the folder `out`, by the method and seed of a conf/convert group."""
    method, seed = convert["method"], convert["seed"]
    return attnzoo.convert(source, spec, method=method, seed=seed, out=out, overwrite=overwrite)


def changes_attention(source: Path, spec: Spec) -> bool:
    """Whether the checkpoint in `source` has another attention than `spec` names."""
    from attnzoo.conversion.families import family_for

    if spec.num_kv_heads is None and spec.mask is None:
        return False
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    heads = family_for(config["model_type"]).geometry(config).num_kv_heads
    return spec.mask is not None or spec.num_kv_heads not in (None, heads)


if __name__ == "__main__":
    main()
