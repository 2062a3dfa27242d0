"""Accumulation windows: the micro-batches of one optimizer step, as one batch for Lightning.

With a window as Lightning's batch, every batch is a step: a checkpoint never falls inside a window, and the number of
target tokens of a step is known before its first backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

from lightning.pytorch import LightningDataModule
from torch import Tensor

from recipes.data import TextDataModule


class StatefulLoader(Protocol):
    """Micro-batches of an epoch; `state_dict` says which one comes next, and iterating again goes on there."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Windows:
    """Gives `steps` windows of `accumulate` micro-batches, going round the loader as often as that takes.

    No window reaches over the end of an epoch, as no batch does, so the last one of an epoch may be smaller.
    Lightning saves and loads `state_dict()` with its checkpoints.

    Args:
        loader: micro-batches of this rank.
        steps: windows to give in all, those before a resume included.
        accumulate: micro-batches of a window.
        pin: put them where a GPU can fetch them while the host goes on; from other memory it makes the host wait.
    """

    def __init__(self, loader: StatefulLoader, *, steps: int, accumulate: int = 1, pin: bool = False) -> None:
        self.loader = loader
        self.steps = steps
        self.accumulate = accumulate
        self.pin = pin
        self.given = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[dict[str, Tensor]]]:
        while self.given < self.steps:
            before = self.given
            batches = iter(self.loader)
            while self.given < self.steps and (window := list(islice(batches, self.accumulate))):
                self.given += 1
                yield [{name: t.pin_memory() for name, t in batch.items()} for batch in window] if self.pin else window
            if self.given == before:
                raise ValueError("the training data gives no batch")

    def state_dict(self) -> dict[str, Any]:
        """Where to go on: after the window that was last given."""
        return {"given": self.given, "loader": self.loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = state["given"]
        self.loader.load_state_dict(state["loader"])


class WindowedData(LightningDataModule):
    """The training windows of each rank, for `Trainer.fit`: made by then, because only then the ranks are known."""

    def __init__(self, data: TextDataModule, *, steps: int, accumulate: int) -> None:
        super().__init__()
        self.data = data
        self.steps = steps
        self.accumulate = accumulate

    def train_dataloader(self) -> Windows:
        assert self.trainer is not None
        loader = self.data.train_loader(rank=self.trainer.global_rank, world_size=self.trainer.world_size)
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        return Windows(loader, steps=self.steps, accumulate=self.accumulate, pin=on_gpu)
