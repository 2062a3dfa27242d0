"""Held-out cross-entropy while training, by domain, and the curve that it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from recipes.module import Uptraining
from recipes.objectives import next_token
from recipes.packed import Batch, count_targets, pack


class Validation(Callback):
    """Measures before the first step, every so many steps, once so many tokens are trained on, and after each stage.

    A callback and not Lightning's validation loop, whose place in the order of a step makes a run that was killed at a
    validation measure it twice or never. `curve` is part of the checkpoints: step, tokens, cross_entropy, the mean of
    the domains', and where there are several, theirs under `domains`; in a run of several stages, `stage` too.

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

    def on_train_start(self, trainer: Trainer, module: Uptraining) -> None:  # type: ignore[override]
        if not self.curve:
            self._measure(trainer, module)

    def on_train_batch_end(self, trainer: Trainer, module: Uptraining, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        ends = step in [stage.end for stage in module.stages]
        if self._reached(module) or ends or step % self.every_n_steps == 0:
            module.log("val/cross_entropy", self._measure(trainer, module), prog_bar=True, logger=False)

    def _reached(self, module: Uptraining) -> bool:
        """Whether another number of tokens is reached; where it may be, the step's own tokens are waited for."""
        measured = self.curve[-1]["tokens"] if self.curve else 0
        ahead = [tokens for tokens in self.at_tokens if tokens > measured]
        if any(tokens <= module.tokens + 2 * module.tokens_of_a_step for tokens in ahead):
            module.settle()
        return any(tokens <= module.tokens for tokens in ahead)

    def state_dict(self) -> dict[str, Any]:
        return {"curve": self.curve}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve = state_dict["curve"]

    @torch.no_grad()
    def _measure(self, trainer: Trainer, module: Uptraining) -> float:
        """The mean over the domains of the mean over their tokens, which the ranks share out."""
        module.settle()
        module.eval()
        domains = self.domains()
        sums = torch.zeros(len(domains), 2, dtype=torch.float64, device=module.device)  # loss, tokens
        # Compiled layers would be compiled again for batches of other sizes without gradients.
        with trainer.precision_plugin.val_step_context(), torch.compiler.set_stance("force_eager"):
            for row, batches in zip(sums, domains.values(), strict=True):
                for batch in _share(islice(batches, self.limit), trainer.global_rank, trainer.world_size):
                    batch = trainer.strategy.batch_to_device(batch)
                    row[0] += module.ask(next_token, batch)
                    row[1] += count_targets(batch)
        module.train()
        means = {}
        for name, (loss, tokens) in zip(domains, module.sum_over_ranks(sums).tolist(), strict=True):
            if not tokens:
                raise ValueError(f"the held-out data ({name}) gives no token to predict")
            means[name] = loss / tokens
        value = sum(means.values()) / len(means)
        point = {"step": trainer.global_step, "tokens": module.tokens, "cross_entropy": value}
        if len(module.stages) > 1:
            point["stage"] = module.stage_before(trainer.global_step).name
        self.curve.append(point | ({"domains": means} if len(means) > 1 else {}))
        for logger in trainer.loggers:  # not module.log, which would repeat the value at every later step
            by_domain = {f"val/cross_entropy_{name}": mean for name, mean in means.items()} if len(means) > 1 else {}
            logger.log_metrics({"val/cross_entropy": value, **by_domain}, step=trainer.global_step)
        return value


def _share(batches: Iterable[Batch], rank: int, world_size: int) -> Iterator[Batch]:
    """One batch in `world_size`; ranks get as many, the last one maybe empty, since they may run the model together."""
    several = iter(batches)
    while together := list(islice(several, world_size)):
        yield together[rank] if rank < len(together) else pack([])
