"""What the runs of a study gave, as one JSON file that the figures are drawn from."""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from recipes.run_folder import PACKAGES, git_commit, installed_version
from recipes.study_plan import Arm, arm_folder
from recipes.study_worker import DONE


def collect(
    experiment: str, study: Mapping[str, Any], arms: Sequence[Arm], folder: Path, *, overrides: Sequence[str]
) -> dict[str, Any]:
    """The results of all arms that have ended, and the names of the others.

    Returns:
        experiment, figure, axes (names of each axis of the grid), overrides, device, versions, commit; `arms`: name,
        axes, seed, overrides, seconds, tokens_per_s (the median step's), evaluations, curve; `missing`: name and seed.
    """
    done = [(arm, arm_folder(folder, arm.key)) for arm in arms]
    return {
        "experiment": experiment,
        "figure": study["figure"],
        "axes": [list(axis) for axis in study["grid"]],
        "overrides": list(overrides),
        "device": _device(),
        "versions": {"python": platform.python_version(), **{name: installed_version(name) for name in PACKAGES}},
        "commit": git_commit(),
        "arms": [_of(arm, here) for arm, here in done if (here / DONE).is_file()],
        "missing": [{"name": arm.name, "seed": arm.seed} for arm, here in done if not (here / DONE).is_file()],
    }


def _of(arm: Arm, here: Path) -> dict[str, Any]:
    report = json.loads((here / DONE).read_text(encoding="utf-8"))
    timing = here / "timing.json"
    return {
        "name": arm.name,
        "axes": list(arm.axes),
        "seed": arm.seed,
        "overrides": list(arm.overrides),
        "seconds": json.loads(timing.read_text(encoding="utf-8"))["seconds"] if timing.is_file() else None,
        "tokens_per_s": _tokens_per_s(here / "logs"),
        "evaluations": report["evaluations"],
        "curve": report["curve"],
    }


def _tokens_per_s(logs: Path) -> float | None:
    """The median over the steps; None where they were not logged."""
    rates = []
    for file in logs.rglob("metrics.csv"):
        with file.open(encoding="utf-8", newline="") as rows:
            rates += [float(row["train/tokens_per_s"]) for row in csv.DictReader(rows) if row.get("train/tokens_per_s")]
    return median(rates) if rates else None


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()
