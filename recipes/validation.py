"""Held-out cross-entropy while training, and the curve that it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from recipes.module import Uptraining
from recipes.objectives import NextToken
from recipes.packed import Batch, count_targets


class Validation(Callback):
    """Measures before the first step, every `every_n_steps` steps and after the last one.

    A callback and not Lightning's validation loop, whose place in the order of a step makes a run that was killed at a
    validation measure it twice or never. `curve` is part of the checkpoints.

    Args:
        batches: gives the held-out batches anew at each call.
        every_n_steps: optimizer steps between two measurements.
        limit: how many batches to measure, the same ones each time; None takes all.
    """

    def __init__(self, batches: Callable[[], Iterable[Batch]], *, every_n_steps: int, limit: int | None = None) -> None:
        self.batches = batches
        self.every_n_steps = every_n_steps
        self.limit = limit
        self.curve: list[dict[str, float]] = []
        self._cross_entropy = NextToken()

    def on_train_start(self, trainer: Trainer, module: Uptraining) -> None:  # type: ignore[override]
        if not self.curve:
            self._measure(trainer, module)

    def on_train_batch_end(self, trainer: Trainer, module: Uptraining, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step == module.total_steps:
            module.log("val/cross_entropy", self._measure(trainer, module), prog_bar=True, logger=False)

    def state_dict(self) -> dict[str, Any]:
        return {"curve": self.curve}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve = state_dict["curve"]

    @torch.no_grad()
    def _measure(self, trainer: Trainer, module: Uptraining) -> float:
        """The token-weighted mean over all batches, which the ranks share out."""
        module.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=module.device)  # loss, tokens
        with trainer.precision_plugin.val_step_context():
            for batch in islice(self.batches(), trainer.global_rank, self.limit, trainer.world_size):
                batch = trainer.strategy.batch_to_device(batch)
                sums[0] += self._cross_entropy(module.model, batch)
                sums[1] += count_targets(batch)
        module.train()
        loss, tokens = module.sum_over_ranks(sums).tolist()
        if not tokens:
            raise ValueError("the held-out data gives no token to predict")
        value = loss / tokens
        self.curve.append({"step": trainer.global_step, "tokens": module.tokens, "cross_entropy": value})
        for logger in trainer.loggers:  # not module.log, which would repeat the value at every later step
            logger.log_metrics({"val/cross_entropy": value}, step=trainer.global_step)
        return value
