"""Refuses a config of uptraining that cannot run, before anything is written."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from recipes.compiling import CHOICES as COMPILE
from recipes.embeddings import UNTIE
from recipes.export import EXPORT_DTYPES
from recipes.lora import check_lora
from recipes.models import DTYPES
from recipes.optim import METHODS, SCHEDULES
from recipes.trained import PARTS

# The numbers that the recipe itself takes: key, smallest value, whether null is allowed.
LEAST = (
    ("batch.size", 1, False),
    ("batch.seq_len", 2, False),
    ("batch.accumulate", 1, False),
    ("validation.every_n_steps", 1, False),
    ("validation.batches", 1, True),
    ("checkpoint.every_n_steps", 1, True),
    ("trainer.log_every_n_steps", 1, False),
    ("trainer.num_nodes", 1, False),
    ("seed", 0, False),
)
ABOVE_ZERO = ("checkpoint.every_n_minutes", "trainer.gradient_clip_norm")
FRACTIONS = ("warmup", "final")  # of optimizer
CHOICES = {
    "export_dtype": tuple(EXPORT_DTYPES),
    "teacher.dtype": tuple(DTYPES),
    "untie_embeddings": UNTIE,
    "trainer.precision": ("auto", "bf16-mixed", "32-true"),
    "trainer.compile": (*COMPILE, True, False),
}


def check_config(config: DictConfig) -> None:
    """Raises a ValueError that names the key, what came and what is allowed."""
    if config.get("study"):
        raise ValueError(f"{config.name} is a study of several runs: attnzoo study {config.name}")
    for key, allowed in CHOICES.items():
        _require(config, key, lambda value, allowed=allowed: value in allowed, f"one of {', '.join(map(str, allowed))}")
    for key, least, optional in LEAST:
        allowed = f"a whole number of at least {least}" + (" or null" if optional else "")
        _require(config, key, lambda v, m=least, o=optional: (v is None and o) or (_is(v, int) and v >= m), allowed)
    for key in ABOVE_ZERO:
        _require(config, key, lambda v: v is None or (_is(v, int, float) and v > 0), "a number above 0 or null")
    for place in ("", *(f"stages.{name}." for name in config.stages or ())):
        _check_optimizer(config, f"{place}optimizer")
        _check_train(config, f"{place}train")
    if config.lora is not None:
        check_lora(config.lora)
    devices = config.trainer.devices
    if not (_is(devices, int) and devices >= 1) and not (OmegaConf.is_list(devices) and devices):
        # "auto" would make the tokens of a step depend on the machine
        raise ValueError(f"trainer.devices must be a number of at least 1 or a list of devices, got {devices!r}")


def _check_train(config: DictConfig, key: str) -> None:
    train = OmegaConf.select(config, key)
    if train is None and key != "train":
        return  # the run's
    patterns = OmegaConf.is_list(train) and train and all(isinstance(one, str) for one in train)
    if not patterns and train not in PARTS:
        raise ValueError(f"{key} must be one of {', '.join(PARTS)} or a list of patterns, got {train!r}")
    if train == "lora" and config.lora is None:
        raise ValueError(f"{key} is lora, and lora is null: there are no adapters to train")


def _check_optimizer(config: DictConfig, place: str) -> None:
    for key in OmegaConf.select(config, place) or ():
        name = f"{place}.{key}"
        if key not in config.optimizer:
            raise ValueError(f"{name} is no field of an optimizer; allowed are {', '.join(config.optimizer)}")
        if key in FRACTIONS:
            _require(config, name, lambda v: _is(v, int, float) and 0 <= v <= 1, "a fraction between 0 and 1")
        elif key == "method":
            if place != "optimizer":
                raise ValueError(f"{name} cannot be another than the run's: a run has one optimizer")
            _require(config, name, lambda v: v in METHODS, f"one of {', '.join(METHODS)}")
        elif key == "schedule":
            _require(config, name, lambda v: v in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        elif key == "betas":
            _require(
                config,
                name,
                lambda v: OmegaConf.is_list(v) and len(v) == 2 and all(_is(b, int, float) and 0 <= b < 1 for b in v),
                "two numbers from 0 to below 1",
            )
        else:
            _require(config, name, lambda v: _is(v, int, float) and v >= 0, "a number of at least 0")


def _require(config: DictConfig, key: str, good, allowed: str) -> None:  # type: ignore[no-untyped-def]
    value = OmegaConf.select(config, key)
    if not good(value):
        raise ValueError(f"{key} must be {allowed}, got {value!r}")


def _is(value: object, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)
