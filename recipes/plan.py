"""`attnzoo plan model.path=FOLDER_OR_CONFIG`: what a model would cost with each mechanism, from its config alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from attnzoo.planning import Gpu, Plan, markdown_table, plan, text_table
from attnzoo.specs import spec_from_dict
from recipes.run_folder import write_whole
from recipes.samples import resolve_sample

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="plan")
def main(config: DictConfig) -> None:
    OmegaConf.resolve(config)
    made = plan(
        read_config(config.model),
        gpu=Gpu(**config.gpu),
        context=config.context,
        batch=config.batch,
        dtype=config.dtype,
        window=config.window,
        global_tokens=config.global_tokens,
        also=[spec_from_dict(spec) for spec in OmegaConf.to_container(config.also)],
    )
    print(text_table(made))
    if config.out is not None:
        log.info("written: %s", write_plan(made, Path(config.out).expanduser()))


def read_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json dictionary that `model.path` names: a file, a folder, `sample:NAME`, or a hub id.

    Raises:
        ValueError: for a path without a config, and a file that is not a JSON object.
    """
    path = resolve_sample(str(model["path"]))
    local = Path(path).expanduser()
    if local.is_dir():
        local /= "config.json"
        if not local.is_file():
            raise ValueError(f"model.path is {path!r}, a folder without config.json")
    if not local.is_file():
        if local.is_absolute() or path.count("/") > 1 or path.startswith((".", "~")) or path.endswith(".json"):
            raise ValueError(f"model.path is {path!r}: there is no such file or folder")
        return _hub_config(path, bool(model["trust_remote_code"]))
    try:
        config = json.loads(local.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{local} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{local} holds {type(config).__name__}, not a config: a JSON object is needed")
    return config


def write_plan(made: Plan, folder: Path) -> Path:
    """Writes plan.json and plan.md into `folder`, which is made when missing."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "plan.json", json.dumps(made.to_dict(), indent=2))
    write_whole(folder / "plan.md", markdown_table(made))
    return folder


def _hub_config(name: str, trust_remote_code: bool) -> dict[str, Any]:
    from transformers import AutoConfig  # slow to import, and a file needs none of it

    return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code).to_dict()


if __name__ == "__main__":
    main()
