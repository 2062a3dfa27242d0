"""The folder of one run: what it was told, from what code and seeds, and what came out."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipes import parallel
from recipes.evaluate import Evaluation

log = logging.getLogger(__name__)

# Keys whose value changes no number that a run gives, or only its rounding, so that a resume may change them.
FREE_TO_CHANGE = (
    "resume",
    "logger",
    "checkpoint",
    "trainer.log_every_n_steps",
    "trainer.progress_bar",
    "trainer.strategy",
    "trainer.reshard_after_forward",
    "trainer.shard_teacher",
    "trainer.stage",
    "trainer.gradient_checkpointing",
    "speed",
    "common",
)

# Keys that may change together, as long as the sequences of a step stay as many.
SHARE_A_STEP = ("trainer.devices", "trainer.num_nodes", "batch.accumulate")

PACKAGES = (
    "attnzoo",
    "torch",
    "transformers",
    "lightning",
    "datasets",
    "hydra-core",
    "safetensors",
    "tokenizers",
    "numpy",
)


class ResumeMismatch(ValueError):
    """The run that is to be resumed was started with another config; the message lists the keys that differ."""


class RunFolder:
    """Paths and records of one run in `path`.

    config.yaml (resolved), run.json (a record for each time that it was started), evaluations.json, converted/,
    checkpoints/, logs/, uptrained/, report.md, report.json and the curve.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.converted = path / "converted"
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.uptrained = path / "uptrained"
        self._record = path / "run.json"
        self._evaluations = path / "evaluations.json"

    def start(self, config: DictConfig, *, seeds: Mapping[str, int]) -> None:
        """Writes down what is about to run, or, where a run lies here already, makes sure that it is the same.

        Args:
            config: the resolved config; `config.resume` says whether a run may lie here (None, a path, or "auto").
            seeds: every seed of the run, by what it seeds.

        Raises:
            ValueError: when a run lies here and none is resumed, or none lies here and one is.
            ResumeMismatch: when the run here was started with another config.
        """
        if self.config.is_file():
            if config.resume is None:
                raise ValueError(f"{self.path} holds a run already; resume={self.path} continues it")
            self._require_same(config)
        elif config.resume not in (None, "auto"):
            raise ValueError(f"resume={config.resume}: there is no run in that folder (no {self.config.name})")
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.config.is_file():
            write_whole(self.config, OmegaConf.to_yaml(config))
        sessions = json.loads(self._record.read_text(encoding="utf-8"))["sessions"] if self._record.is_file() else []
        sessions.append(_session(seeds))
        write_whole(self._record, json.dumps({"sessions": sessions}, indent=2))

    def continued(self, config: DictConfig, overrides: Iterable[str]) -> DictConfig:
        """What a resumed run goes on with: the config that it was started with, and what the overrides change in it.

        A run that is not resumed, and a command that names an experiment, keep `config`, composed from the command
        line. Where another number of processes trains now, `adapt` says what becomes of the batch.
        """
        if config.resume is None or not self.config.is_file():
            return config
        kept, absent = OmegaConf.load(self.config), object()
        assert isinstance(kept, DictConfig)
        for override in overrides:
            key = override.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".")
            value = OmegaConf.select(config, key, default=absent)
            if value is absent:
                return config
            OmegaConf.update(kept, key, value, merge=False)
        return kept

    def adapt(self, config: DictConfig) -> None:
        """Sets batch.accumulate, in place, so that a step of a resumed run takes as many sequences as before.

        Raises:
            ResumeMismatch: when the processes of today cannot share them out.
        """
        if config.resume is None or not self.config.is_file():
            return
        before = OmegaConf.load(self.config)
        wanted, each = _sequences(before), config.batch.size * parallel.world_size(config.trainer)
        if _sequences(config) == wanted or config.batch.accumulate != before.batch.accumulate:
            return
        if wanted % each:
            raise ResumeMismatch(
                f"a step of {self.path} takes {wanted} sequences, which {each // config.batch.size} processes with "
                f"batch.size={config.batch.size} cannot share out evenly: their number must divide "
                f"{wanted // config.batch.size}"
            )
        config.batch.accumulate = wanted // each
        log.info("batch.accumulate is %d now, so that a step takes %d sequences still", wanted // each, wanted)

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """What was evaluated so far, by name."""
        if not self._evaluations.is_file():
            return {}
        rows = json.loads(self._evaluations.read_text(encoding="utf-8"))
        return {row["name"]: Evaluation(**row) for row in rows}

    def add(self, evaluation: Evaluation) -> None:
        """Keeps an evaluation, so that a resumed run need not make it again."""
        rows = {**self.evaluations, evaluation.name: evaluation}
        write_whole(self._evaluations, json.dumps([vars(row) for row in rows.values()], indent=2))

    def drop_if_nothing_ran(self) -> None:
        """Removes the folder of a run that gave nothing: it was refused, or stopped before its first result."""
        records = {self.config.name, self._record.name}
        if self.path.is_dir() and all(f.suffix == ".log" or f.name in records for f in self.path.iterdir()):
            shutil.rmtree(self.path)
            for parent in self.path.parents:
                if parent == Path.cwd() or Path.cwd() not in parent.parents or any(parent.iterdir()):
                    break
                parent.rmdir()

    def _require_same(self, config: DictConfig) -> None:
        started_with = OmegaConf.load(self.config)
        before, now = _flat(started_with), _flat(config)
        missing = "nothing"
        free = SHARE_A_STEP if _sequences(started_with) == _sequences(config) else ()
        differing = [
            f"  {key}: {before.get(key, missing)!r} in the run, {now.get(key, missing)!r} now"
            for key in sorted(before | now)
            if before.get(key, missing) != now.get(key, missing) and not _is_free(key, free)
        ]
        if differing:
            raise ResumeMismatch(
                f"{self.path} was started with another config, which would give another result:\n"
                + "\n".join(differing)
                + f"\nresume={self.path} alone takes the config of the run"
            )


def write_whole(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")
    partial.replace(path)


def _is_free(key: str, also: Iterable[str]) -> bool:
    return any(key == free or key.startswith(free + ".") for free in (*FREE_TO_CHANGE, *also))


def _sequences(config: Any) -> int:
    """Sequences of a step, over all processes."""
    return config.batch.size * config.batch.accumulate * parallel.world_size(config.trainer)


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config, resolve=True)
    if not isinstance(config, dict) or not config:
        return {prefix.removesuffix("."): config}
    return {k: v for name, value in config.items() for k, v in _flat(value, f"{prefix}{name}.").items()}


def _session(seeds: Mapping[str, int]) -> dict[str, Any]:
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "git_commit": git_commit(),
        "seeds": dict(seeds),
        "versions": {"python": sys.version.split()[0], **{name: installed_version(name) for name in PACKAGES}},
    }


def git_commit() -> str:
    """The commit that this code was checked out at, with -dirty where it was changed since."""
    here = Path(__file__)
    try:
        for command in (["ls-files", "--error-unmatch", here.name], ["describe", "--always", "--dirty", "--abbrev=40"]):
            done = subprocess.run(["git", "-C", here.parent, *command], capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
