"""Held-out cross-entropy while training, by domain, and the curve that it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from recipes.module import Uptraining
from recipes.objectives import NextToken
from recipes.packed import Batch, count_targets


class Validation(Callback):
    """Measures before the first step, every `every_n_steps` steps, once so many tokens are trained on, and at the end.

    A callback and not Lightning's validation loop, whose place in the order of a step makes a run that was killed at a
    validation measure it twice or never. `curve` is part of the checkpoints: step, tokens, cross_entropy, the mean of
    the domains', and where there are several, theirs under `domains`.

    Args:
        domains: gives the held-out batches of each domain anew at each call.
        every_n_steps: optimizer steps between two measurements.
        at_tokens: numbers of tokens after which to measure too, at the first step that reaches them.
        limit: how many batches of each domain to measure, the same ones each time; None takes all.
    """

    def __init__(
        self,
        domains: Callable[[], Mapping[str, Iterable[Batch]]],
        *,
        every_n_steps: int,
        at_tokens: Sequence[float] = (),
        limit: int | None = None,
    ) -> None:
        self.domains = domains
        self.every_n_steps = every_n_steps
        self.at_tokens = at_tokens
        self.limit = limit
        self.curve: list[dict[str, Any]] = []
        self._cross_entropy = NextToken()

    def on_train_start(self, trainer: Trainer, module: Uptraining) -> None:  # type: ignore[override]
        if not self.curve:
            self._measure(trainer, module)

    def on_train_batch_end(self, trainer: Trainer, module: Uptraining, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        measured = self.curve[-1]["tokens"] if self.curve else 0
        reached = any(measured < tokens <= module.tokens for tokens in self.at_tokens)
        if reached or step % self.every_n_steps == 0 or step == module.total_steps:
            module.log("val/cross_entropy", self._measure(trainer, module), prog_bar=True, logger=False)

    def state_dict(self) -> dict[str, Any]:
        return {"curve": self.curve}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve = state_dict["curve"]

    @torch.no_grad()
    def _measure(self, trainer: Trainer, module: Uptraining) -> float:
        """The mean over the domains of the mean over their tokens, which the ranks share out."""
        module.eval()
        domains = self.domains()
        sums = torch.zeros(len(domains), 2, dtype=torch.float64, device=module.device)  # loss, tokens
        with trainer.precision_plugin.val_step_context():
            for row, batches in zip(sums, domains.values(), strict=True):
                for batch in islice(batches, trainer.global_rank, self.limit, trainer.world_size):
                    batch = trainer.strategy.batch_to_device(batch)
                    row[0] += self._cross_entropy(module.model, batch)
                    row[1] += count_targets(batch)
        module.train()
        means = {}
        for name, (loss, tokens) in zip(domains, module.sum_over_ranks(sums).tolist(), strict=True):
            if not tokens:
                raise ValueError(f"the held-out data ({name}) gives no token to predict")
            means[name] = loss / tokens
        value = sum(means.values()) / len(means)
        point = {"step": trainer.global_step, "tokens": module.tokens, "cross_entropy": value}
        self.curve.append(point | ({"domains": means} if len(means) > 1 else {}))
        for logger in trainer.loggers:  # not module.log, which would repeat the value at every later step
            by_domain = {f"val/cross_entropy_{name}": mean for name, mean in means.items()} if len(means) > 1 else {}
            logger.log_metrics({"val/cross_entropy": value, **by_domain}, step=trainer.global_step)
        return value
