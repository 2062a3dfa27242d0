"""The runs of a study: its arms, each a list of overrides of `attnzoo uptrain`, for every seed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from recipes.common import fingerprint

FIELDS = ("seeds", "arms", "grid", "each", "figure")
FIGURES = ("curves", "gqa_paper", "compare")
OmegaConf.register_new_resolver("part", lambda whole, share: float(whole) * float(share), replace=True)
NEEDED = re.compile(r"\{arm:([^}]+)\}")  # in an override: the folder of the model that this arm ends with


@dataclass(frozen=True)
class Arm:
    """One run of a study.

    name: of the arm; runs of several seeds share it.
    axes: which entry of each axis of the grid it is; empty for an arm by itself.
    seed: of the run.
    overrides: what it adds to the study's experiment.
    needs: keys of the runs that have to end before it.
    config: of `attnzoo uptrain`, not yet resolved.
    key: the name of its folder: equal runs of all studies in one place are one.
    """

    name: str
    axes: tuple[str, ...]
    seed: int
    overrides: tuple[str, ...]
    needs: tuple[str, ...]
    config: Mapping[str, Any]
    key: str


def read_study(experiment: str, overrides: Sequence[str]) -> Mapping[str, Any]:
    """The `study` of an experiment, as a dictionary with all fields.

    seeds; arms, overrides by name; grid, a list of axes of such, every combination of which is an arm; each, overrides
    of all arms of the grid; figure, what is drawn. An override may name the model that another arm ends with, of the
    same seed, as {arm:NAME}.

    Raises:
        ValueError: for an experiment that is no study, and for an unknown field or figure.
    """
    study = OmegaConf.to_container(composed([f"experiment={experiment}", *overrides])).get("study")
    if not study:
        raise ValueError(
            f"experiment={experiment} has no study: it is one run, attnzoo uptrain experiment={experiment}"
        )
    unknown = sorted(set(study) - set(FIELDS))
    if unknown:
        raise ValueError(f"study.{unknown[0]} is no field of a study; allowed are {', '.join(FIELDS)}")
    study = {"seeds": [0], "arms": {}, "grid": [], "each": [], "figure": "curves"} | study
    if study["figure"] not in FIGURES:
        raise ValueError(f"study.figure is {study['figure']!r}; allowed are {', '.join(FIGURES)}")
    if not study["arms"] and not study["grid"]:
        raise ValueError("study has neither arms nor a grid")
    return study


def plan_arms(experiment: str, overrides: Sequence[str], folder: Path) -> list[Arm]:
    """All runs of a study, in order: arm by arm, and within each arm seed by seed; needed ones first.

    Args:
        experiment: of conf/experiment.
        overrides: of all arms; what an arm says itself comes after them.
        folder: of the studies' runs; they have its `common` in common.
    """
    study = read_study(experiment, overrides)
    named = {name: ((), list(own or ())) for name, own in study["arms"].items()}
    for entries in product(*reversed([list(axis) for axis in study["grid"]])):
        axes = tuple(reversed(entries))  # the first axis changes fastest, so that the first arms start differently
        own = [one for axis, entry in zip(study["grid"], axes, strict=True) for one in axis[entry] or ()]
        if axes:
            named[", ".join(axes)] = (axes, [*study["each"], *own])
    arms: dict[tuple[str, int], Arm] = {}
    for name, (axes, own) in named.items():
        for seed in study["seeds"]:
            needed = [found for one in own for found in NEEDED.findall(one)]
            missing = [other for other in needed if (other, seed) not in arms]
            if missing:
                raise ValueError(f"study.arms: {name!r} needs {missing[0]!r}, which is no arm before it")
            keys = {other: arms[other, seed].key for other in needed}
            ends = {other: str(arm_folder(folder, key) / "uptrained") for other, key in keys.items()}
            filled = [NEEDED.sub(lambda found, ends=ends: ends[found[1]], one) for one in own]
            config = composed([f"experiment={experiment}", *overrides, *filled, f"seed={seed}"])
            plain = _of_a_run(config, name, folder)
            key = fingerprint({key: value for key, value in plain.items() if key not in ("name", "common")})
            arms[name, seed] = Arm(name, axes, seed, tuple(own), tuple(keys.values()), plain, key)
    return list(arms.values())


def arm_folder(folder: Path, key: str) -> Path:
    """Where a run lies."""
    return folder / "runs" / key


def composed(overrides: Sequence[str]) -> DictConfig:
    """The config of `attnzoo uptrain` with these overrides."""
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base="1.3"):
        return compose("uptrain", list(overrides))


def _of_a_run(config: DictConfig, name: str, folder: Path) -> dict[str, Any]:
    config = OmegaConf.create(OmegaConf.to_container(config))
    config.pop("study")
    config.name = name
    config.common = str(folder / "common")
    config.resume = "auto"
    OmegaConf.resolve(config)
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return plain
