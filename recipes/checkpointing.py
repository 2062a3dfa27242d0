"""Checkpoints of a run: folders of safetensors and JSON that appear whole or not at all, and nothing to unpickle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file

TENSORS, STATE = "tensors.safetensors", "state.json"


class SafetensorsIO(CheckpointIO):
    """Lightning's checkpoint dictionary as a folder: its tensors as safetensors, all else as JSON."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            tensors: dict[str, torch.Tensor] = {}
            state = _pack(checkpoint, "", tensors, {})
            save_file(tensors, partial / TENSORS)
            (partial / STATE).write_text(json.dumps(state), encoding="utf-8")
            for file in (partial / TENSORS, partial / STATE, partial):
                _to_disk(file)
            partial.rename(path)
            _to_disk(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        tensors = load_file(Path(path) / TENSORS)
        return _unpack(json.loads((Path(path) / STATE).read_text(encoding="utf-8")), tensors)

    def remove_checkpoint(self, path: str | Path) -> None:
        path = Path(path)
        doomed = path.with_name(f".{path.name}.removed")
        path.rename(doomed)  # at once, so that a kill in the middle leaves no half checkpoint behind
        shutil.rmtree(doomed)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder`, None where there is none."""
    return max(folder.glob("step_*"), default=None)


class Checkpoints(Callback):
    """Saves every so many steps or minutes, at the end, and when the process is asked to stop.

    The older checkpoint goes when the new one is complete. SIGINT (Ctrl-C) and SIGTERM end the run after the step under
    way, with a checkpoint; a second SIGINT ends it at once, with the checkpoint that was there.

    Args:
        folder: where the checkpoints lie, as step_00000012.
        every_n_steps: optimizer steps between two checkpoints; None does not count steps.
        every_n_minutes: minutes between two checkpoints; None does not look at the clock.
    """

    def __init__(self, folder: Path, *, every_n_steps: int | None = None, every_n_minutes: float | None = None) -> None:
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.stopped_by: int | None = None  # number of the signal
        self._saved_at = time.monotonic()
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            for left_over in self.folder.glob(".step_*"):  # by a kill while saving or removing
                shutil.rmtree(left_over)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._stop)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        stop, save = trainer.strategy.broadcast((self.stopped_by, self._is_due(step)))
        trainer.should_stop = trainer.should_stop or stop is not None
        if save or stop is not None or step == trainer.max_steps:
            self._save(trainer, step)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _is_due(self, step: int) -> bool:
        minutes = (time.monotonic() - self._saved_at) / 60
        by_steps = self.every_n_steps is not None and step % self.every_n_steps == 0
        return by_steps or (self.every_n_minutes is not None and minutes >= self.every_n_minutes)

    def _save(self, trainer: Trainer, step: int) -> None:
        older = list(self.folder.glob("step_*")) if trainer.is_global_zero else []
        trainer.save_checkpoint(self.folder / f"step_{step:08d}", weights_only=False)
        for path in older:
            trainer.strategy.remove_checkpoint(path)
        self._saved_at = time.monotonic()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_by == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.stopped_by = number


def _pack(value: Any, path: str, tensors: dict[str, torch.Tensor], names: dict[Any, str]) -> Any:
    """`value` as JSON; its tensors go to `tensors`, each storage once, under the path that leads to it."""
    if isinstance(value, torch.Tensor):
        key = (value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else path
        if key not in names:
            names[key] = path
            tensors[path] = value.detach().contiguous()
        return {"tensor": names[key]}
    if isinstance(value, Mapping):
        return {"items": [[k, _pack(v, f"{path}/{k}", tensors, names)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        packed = [_pack(v, f"{path}/{i}", tensors, names) for i, v in enumerate(value)]
        return packed if isinstance(value, list) else {"tuple": packed}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"a checkpoint cannot hold the {type(value).__name__} at {path}")


def _unpack(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_unpack(v, tensors) for v in value["tuple"])
    return {k: _unpack(v, tensors) for k, v in value["items"]}


def _to_disk(path: Path) -> None:
    """Waits until the file or folder has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
