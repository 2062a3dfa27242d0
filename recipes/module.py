"""The LightningModule that uptrains a language model: one call of training_step is one optimizer step."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from recipes.objectives import Objective
from recipes.optim import adamw, learning_rate_factor
from recipes.packed import Batch, count_targets


class NotFinite(ValueError):
    """The loss or its gradient became infinite or NaN; the weights are still those before the step."""


class Uptraining(LightningModule):
    """Trains `model` on windows of packed micro-batches.

    The gradient of a step is the sum of the token losses over the number of target tokens, both over all micro-batches
    and ranks, so how a step is cut into micro-batches changes nothing but rounding.

    Args:
        model: a transformers causal language model; parameters that should stay have requires_grad False.
        objective: gives the sum of the token losses of a micro-batch.
        optimizer: lr, betas, eps, weight_decay, schedule, warmup and final, as in conf/optimizer.
        total_steps: optimizer steps of the whole run.
        gradient_clip_norm: largest norm of a step's gradient; None does not clip.
        seed: with the step and the rank it seeds each step's random numbers, so a resumed run draws what it would have.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        optimizer: Mapping[str, Any],
        total_steps: int,
        gradient_clip_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # Lightning's own accumulation averages means of micro-batches
        self.model = model
        self.objective = objective
        self.optimizer_config = dict(optimizer)
        self.total_steps = total_steps
        self.gradient_clip_norm = gradient_clip_norm
        self.seed = seed
        self.tokens = 0  # tokens trained on so far, over all ranks
        self._factor = partial(
            learning_rate_factor,
            total_steps=total_steps,
            schedule=self.optimizer_config.pop("schedule"),
            warmup=self.optimizer_config.pop("warmup"),
            final=self.optimizer_config.pop("final"),
        )

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = adamw(self.model, **self.optimizer_config)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, self._factor)}

    def training_step(self, window: list[Batch], index: int) -> None:
        started = time.perf_counter()
        torch.manual_seed(_mix(self.seed, self.global_step, self.global_rank))
        optimizer = self.optimizers()
        targets, tokens = self.sum_over_ranks(
            torch.stack(
                [
                    sum(count_targets(batch) for batch in window),  # type: ignore[arg-type]
                    torch.tensor(sum(batch["input_ids"].numel() for batch in window), device=self.device),
                ]
            )
        )
        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(window, start=1):
            with self._without_sync(number < len(window)):
                share = self.objective(self.model, batch) / targets
                self.manual_backward(share * self.trainer.world_size)  # the ranks' gradients are averaged
            loss += share.detach()
        loss_now = float(self.sum_over_ranks(loss))
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.gradient_clip_norm or math.inf))
        self._require_finite(loss_now, norm)
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step()
        self.tokens += int(tokens)
        self.log_dict(
            {
                "train/loss": loss_now,
                "train/tokens_per_s": float(tokens) / (time.perf_counter() - started),
                "train/lr": rate,
            },
            prog_bar=True,
        )
        self.log_dict({"train/gradient_norm": norm, "train/tokens": float(self.tokens)})

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """The sum of each rank's value; on one rank the value itself."""
        return self.trainer.strategy.reduce(value, reduce_op="sum")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens"] = self.tokens

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens = checkpoint["tokens"]

    def _without_sync(self, without: bool) -> AbstractContextManager[Any]:
        """Only the last micro-batch of a window exchanges gradients between ranks."""
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return block() if without and block is not None else nullcontext()

    def _require_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        raise NotFinite(
            f"step {self.global_step + 1}: the loss is {loss} and the norm of its gradient {norm}, so training stops "
            "before they reach the weights; the last checkpoint is good. A lower optimizer.lr, a longer "
            "optimizer.warmup or trainer.precision=32-true may help"
        )


def _mix(seed: int, step: int, rank: int) -> int:
    """A seed of its own for each step and rank."""
    return hash((seed, step, rank)) & 0x7FFF_FFFF_FFFF_FFFF
