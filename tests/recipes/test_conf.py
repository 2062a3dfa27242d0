"""Every config under conf/ can be chosen, and a key that does not exist is an error."""

from importlib.resources import files

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from attnzoo.specs import spec_from_dict
from recipes.check import check_config
from recipes.trainer import build_loggers

GROUPS = {
    group: sorted(file.name.removesuffix(".yaml") for file in (files("conf") / group).iterdir() if file.name[0] != "_")
    for group in ("attention", "convert", "data", "experiment", "logger", "model", "objective", "optimizer", "trainer")
}
MISSING = ["data.path=text", "model.path=model"]  # what some options leave to the user


def compose_job(name, *overrides):
    with initialize_config_module("conf", version_base="1.3"):
        config = compose(name, list(overrides))
    OmegaConf.resolve(config)
    return config


@pytest.mark.parametrize(("group", "option"), [(group, option) for group, names in GROUPS.items() for option in names])
def test_every_option_of_every_group_can_be_chosen(group, option):
    config = compose_job("uptrain", f"{group}={option}", *MISSING)
    if config.get("study"):
        with pytest.raises(ValueError, match=f"attnzoo study {option}"):
            check_config(config)
    else:
        check_config(config)
    if group == "attention" and option == "gqa":
        config.attention.num_kv_heads = 2
    spec_from_dict(OmegaConf.to_container(config.attention))


def test_the_default_is_the_experiment_that_the_readme_shows():
    assert compose_job("uptrain") == compose_job("uptrain", "experiment=smollm2_mqa")
    assert compose_job("uptrain", "experiment=none").max_steps is None
    assert compose_job("uptrain", "seed=3").convert.seed == 3


@pytest.mark.parametrize("key", ["sed=1", "optimizer.learning_rate=1", "attention.heads=1", "trainer.gpus=1"])
def test_an_unknown_key_is_an_error(key):
    with pytest.raises(ConfigCompositionException, match=key.partition("=")[0].rpartition(".")[2]):
        compose_job("uptrain", key)


def test_weights_and_biases_is_imported_only_when_it_is_chosen(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # as if it were not installed
    for logger in ("none", "csv", "tensorboard", "csv_tensorboard"):
        build_loggers(compose_job("uptrain", f"logger={logger}").logger, folder=tmp_path, first_step=0)
    with pytest.raises(Exception, match="wandb"):
        build_loggers(compose_job("uptrain", "logger=wandb").logger, folder=tmp_path, first_step=0)
