"""The window of a step whose numbers were not finite, kept so that the step can be looked at again."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes.module import NotFinite, Uptraining, step_seed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadStep:
    """What a process was about to learn from.

    step: the optimizer step, from 1; the weights are those after step - 1.
    loss, gradient_norm: of the step, over all processes.
    torch_seed: what `torch.manual_seed` got at its beginning.
    rank, world_size: which of the processes this one was.
    micro_batches: how many.
    """

    step: int
    loss: float
    gradient_norm: float
    torch_seed: int
    rank: int
    world_size: int
    micro_batches: int


class KeepBadBatch(Callback):
    """Writes the window of a step that raised NotFinite to `folder`/step_00000012, a pair of files for each process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_exception(self, trainer: Trainer, module: Uptraining, exception: BaseException) -> None:  # type: ignore[override]
        if not isinstance(exception, NotFinite):
            return
        rank = trainer.global_rank
        bad = BadStep(
            step=exception.step,
            loss=exception.loss,
            gradient_norm=exception.norm,
            torch_seed=step_seed(module.seed, exception.step - 1, rank),
            rank=rank,
            world_size=trainer.world_size,
            micro_batches=len(exception.window),
        )
        folder = self.folder / f"step_{exception.step:08d}"
        try:
            write_bad_step(folder, bad, exception.window)
        except OSError as error:
            log.error("the batch of step %d could not be kept: %s", exception.step, error)
        else:
            log.error("the batch of step %d is kept in %s", exception.step, folder)


def write_bad_step(folder: Path, bad: BadStep, window: Sequence[Mapping[str, Tensor]]) -> None:
    """process_0.safetensors with `0.input_ids`, `0.cu_seqlens` and so on of each micro-batch, and process_0.json."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"{n}.{key}": value.contiguous().cpu() for n, batch in enumerate(window) for key, value in batch.items()}
    save_file(named, folder / f"process_{bad.rank}.safetensors")
    (folder / f"process_{bad.rank}.json").write_text(json.dumps(asdict(bad), indent=2) + "\n", encoding="utf-8")


def read_bad_step(folder: Path, rank: int = 0) -> tuple[BadStep, list[dict[str, Any]]]:
    """What `write_bad_step` wrote: the step, and its micro-batches as the objective got them."""
    bad = BadStep(**json.loads((folder / f"process_{rank}.json").read_text(encoding="utf-8")))
    window: list[dict[str, Tensor]] = [{} for _ in range(bad.micro_batches)]
    for name, value in load_file(folder / f"process_{rank}.safetensors").items():
        number, _, key = name.partition(".")
        window[int(number)][key] = value
    return bad, window
