"""When a run saves, and how it ends when it is asked to stop."""

from __future__ import annotations

import logging
import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer

from recipes import parallel
from recipes.checkpoint_files import NotWritten, read_checkpoint, write_checkpoint
from recipes.checkpoint_state import load_whole

log = logging.getLogger(__name__)

TRY_AGAIN = 75  # EX_TEMPFAIL: nothing is wrong, a resume goes on
INTERRUPTED = 130
# Ctrl-C; a scheduler that wants its machine back. SIGUSR2 belongs to submitit, and stops a run that it started.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class SafetensorsIO(CheckpointIO):
    """Lightning's checkpoint dictionary as a folder of safetensors and JSON, written and read by one process."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load_whole(read_checkpoint(Path(path)))

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

    The older checkpoint goes when the new one has been read back. One that cannot be written (a full disk) leaves the
    older one in its place, and the run goes on. SIGINT (Ctrl-C), SIGTERM and SIGUSR1, at any of the run's processes,
    end the run after the step under way, with a checkpoint; a second SIGINT ends it at once, with the checkpoint that
    was there.

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
        self._before: dict[int | None, Any] = {}  # handlers

    @property
    def exit_code(self) -> int:
        """What a stopped process exits with: 130 after Ctrl-C, 75 ("try again") after the signals of a scheduler.

        Lightning kills a run in which a process that it started itself ends with another code than 0.
        """
        if parallel.launcher() is None and not parallel.is_main_process():
            return 0
        return INTERRUPTED if self.stopped_by == signal.SIGINT else TRY_AGAIN

    def leave(self) -> NoReturn:
        """Ends a process that was stopped; a handler that was there runs first: submitit's queues the job again."""
        handler = self._before.get(self.stopped_by)
        if callable(handler) and self.stopped_by != signal.SIGINT:
            handler(self.stopped_by, None)
        sys.exit(self.exit_code)

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        # Before Lightning has handlers of its own, which `teardown` would bring back when they are gone.
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self._before = {number: handler for number, handler in handlers.items() if handler is not None}
        if not callable(self._before[signal.SIGUSR2]):
            del self._before[signal.SIGUSR2]

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            for left_over in self.folder.glob(".step_*"):  # by a kill while saving or removing
                shutil.rmtree(left_over)
        for number in self._before:
            signal.signal(number, self._stop)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        stopped_by, due = parallel.largest([self.stopped_by or 0, self._is_due(step)])
        if stopped_by:
            self.stopped_by, trainer.should_stop = stopped_by, True
        if due or stopped_by or step == trainer.max_steps:
            self._save(trainer, step)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _is_due(self, step: int) -> bool:
        minutes = (time.monotonic() - self._saved_at) / 60
        by_steps = self.every_n_steps is not None and step % self.every_n_steps == 0
        return by_steps or (self.every_n_minutes is not None and minutes >= self.every_n_minutes)

    def _save(self, trainer: Trainer, step: int) -> None:
        older = list(self.folder.glob("step_*")) if trainer.is_global_zero else []
        self._saved_at = time.monotonic()
        try:
            trainer.save_checkpoint(self.folder / f"step_{step:08d}", weights_only=False)
        except NotWritten as error:
            kept = f"{older[0].name} stays the last one" if older else "there is no older one"
            if self.stopped_by is not None:
                raise NotWritten(f"stopped after step {step}, whose checkpoint failed ({error}); {kept}") from error
            log.error("the checkpoint of step %d failed (%s); %s, and the run goes on", step, error, kept)
            return
        for path in older:
            try:
                trainer.strategy.remove_checkpoint(path)
            except OSError as error:
                log.warning("the older checkpoint %s could not be removed: %s", path, error)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_by == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.stopped_by = number
