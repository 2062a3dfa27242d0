"""`attnzoo swap model.path=DIR attention=mla out=DIR`: a model with other attention layers, as a folder that loads."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

import attnzoo
from attnzoo.conversion.folders import check_free
from attnzoo.hf import export
from attnzoo.specs import GQA, Spec
from recipes.convert import read_spec
from recipes.models import load_model, load_tokenizer

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="swap")
def main(config: DictConfig) -> None:
    OmegaConf.resolve(config)
    spec, out = read_spec(config.attention), check_free(config.out, overwrite=config.overwrite)
    model = load_model(config.model)
    torch.manual_seed(config.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="save_pretrained of this model")  # `export` does that
        attnzoo.swap(model, specs_of(spec, config.layers, model.config.get_text_config().num_hidden_layers))
    folder = export(model, out, tokenizer=load_tokenizer(config.model), overwrite=config.overwrite)
    log.info("swapped to %s: %s", spec, folder)
    if (folder / "modeling_attnzoo.py").is_file():
        log.info("it loads after `import attnzoo.hf`, or without attnzoo by trust_remote_code=True")


def specs_of(spec: Spec, layers: Sequence[int] | None, num_layers: int) -> Spec | list[Spec]:
    """One spec for all layers, or a list that leaves those not in `layers` as they are.

    Raises:
        ValueError: for a layer that the model has not.
    """
    if layers is None:
        return spec
    unknown = [layer for layer in layers if layer not in range(num_layers)]
    if unknown:
        raise ValueError(f"layers names {unknown}; the model has the layers 0 to {num_layers - 1}")
    return [spec if layer in layers else GQA() for layer in range(num_layers)]


if __name__ == "__main__":
    main()
