"""The LightningModule that uptrains a language model: one call of training_step is one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from transformers import PreTrainedModel

from recipes.objectives import Layers, Loss, Objective
from recipes.optim import build_optimizer, configure, skips_on_device
from recipes.packed import Batch, count_targets
from recipes.readings import Reading, Readings
from recipes.sharded import Sharded, clip_gradients
from recipes.stages import Stage, stage_at
from recipes.trained import trained_names, within_layers


class NotFinite(ValueError):
    """The loss or its gradient became infinite or NaN; the weights are still those before the step.

    step: the optimizer step, from 1. window: its micro-batches on this rank.
    """

    def __init__(self, step: int, loss: float, norm: float, window: list[Batch]) -> None:
        super().__init__(
            f"step {step}: the loss is {loss} and the norm of its gradient {norm}, so training stops before they reach "
            "the weights; the last checkpoint is good. A lower optimizer.lr, a longer optimizer.warmup or "
            "trainer.precision=32-true may help"
        )
        self.step, self.loss, self.norm, self.window = step, loss, norm, window


class Uptraining(LightningModule):
    """Trains `model` on windows of packed micro-batches.

    The gradient of a step is the sum of the token losses over the number of target tokens, both over all micro-batches
    and ranks, so how a step is cut into micro-batches changes nothing but rounding.

    On a GPU nothing waits for a step's numbers: they are read a step later, and an update that is not finite, with
    all that follow it, is left out on the device itself. `settle` reads what is outstanding.

    Args:
        model: a transformers causal language model.
        stages: of the run, in order.
        objectives: of each stage; of a stage that is over already it may be None.
        gradient_clip_norm: largest norm of a step's gradient; None does not clip.
        seed: with the step and the rank it seeds each step's random numbers, so a resumed run draws what it would have.
        probe: gives packed batches on which objectives measure what they need before training.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stages: Sequence[Stage],
        objectives: Sequence[Objective | None],
        *,
        gradient_clip_norm: float | None = None,
        seed: int = 0,
        probe: Callable[[], Iterable[Batch]] = tuple,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # Lightning's own accumulation averages means of micro-batches
        self.model = model
        self.stages = stages
        self.objectives = list(objectives)
        self.total_steps = stages[-1].end
        self.gradient_clip_norm = gradient_clip_norm
        self.seed = seed
        self.tokens = 0  # trained on in all steps that were read, over all ranks
        self.tokens_of_a_step = 0  # of the last step that was read
        self.shown: dict[str, float] = {}  # the numbers of the last step that was read
        self._probe = probe
        self._trained = [trained_names(model, stage.train) for stage in stages]
        self._stage: int | None = None
        self._still: list[Tensor] = []  # parameters of this stage that do not train
        self._readings = Readings()
        self._bad: Tensor | None = None  # 1.0 from the first step on whose numbers are not finite
        _train_only(model, set().union(*self._trained))
        self._leaves_some_out = len(stages) > 1 or any(stage.leaves_some_out for stage in stages)

    def stage_before(self, step: int) -> Stage:
        """The stage in which so many steps of the run were taken; the first one before any."""
        return self.stages[stage_at(self.stages, max(0, step - 1))]

    def configure_model(self) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, Sharded):
            strategy.shard(self.model)
        if isinstance(strategy, DDPStrategy) and self._leaves_some_out:
            strategy._ddp_kwargs["find_unused_parameters"] = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model, self.stages[0].optimizer["method"])

    def on_fit_start(self) -> None:
        strategy = self.trainer.strategy
        for objective in self.objectives:
            if objective is not None and objective.teacher is not None:
                if isinstance(strategy, Sharded):
                    strategy.place_teacher(objective.teacher.model)
                else:
                    objective.teacher.to(self.device)
                if objective.layers is not None:
                    batches = (strategy.batch_to_device(batch) for batch in self._probe())
                    objective.layers.measure(objective.teacher, batches)

    def training_step(self, window: list[Batch], index: int) -> None:
        stage, objective = self._enter(stage_at(self.stages, self.global_step))
        progress, rate = stage.progress(self.global_step), stage.learning_rate(self.global_step)
        torch.manual_seed(step_seed(self.seed, self.global_step, self.global_rank))
        self.model.zero_grad()
        held = torch.full((), sum(batch["input_ids"].numel() for batch in window), device=self.device)
        counts = torch.stack([sum(map(count_targets, window)), held])  # type: ignore[list-item]
        targets, tokens = self.sum_over_ranks(counts).clamp(min=1)
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(window, start=1):
            with self._without_sync(number < len(window)):
                loss: Loss = self.ask(objective, batch, progress)
                self.manual_backward(loss.total * (self.trainer.world_size / targets))  # ranks' gradients are averaged
            for name, value in {"loss": loss.total.detach(), **loss.terms}.items():
                sums[name] = sums[name] + value if name in sums else value
        means = self.sum_over_ranks(torch.stack([*sums.values()]) / targets)
        norm = self._clip()
        values = torch.cat([means, torch.stack([norm, tokens])])
        self._readings.put(self.global_step + 1, [*sums, "gradient_norm", "tokens"], values, rate, window)
        self._update(values, rate)

    def settle(self) -> None:
        """Reads the numbers of all steps so far: logs them, and raises NotFinite for the first that are not finite."""
        for reading in self._readings.take():
            self._read(reading)

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(model, *args)`, wherever the model's weights lie."""
        strategy = self.trainer.strategy
        return strategy.run(function, *args) if isinstance(strategy, Sharded) else function(self.model, *args)

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """The sum of each rank's value; on one rank the value itself."""
        if self.trainer.world_size > 1:
            dist.all_reduce(value)  # and not the strategy's reduce, which has every process wait for its device
        return value

    def on_train_end(self) -> None:
        self.settle()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.settle()
        checkpoint["tokens"] = self.tokens

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens = checkpoint["tokens"]

    def _enter(self, number: int) -> tuple[Stage, Objective]:
        """The stage and its objective. Where it begins the optimizer forgets; within it, after a resume, it goes on."""
        stage, objective = self.stages[number], self.objectives[number]
        assert objective is not None
        if number != self._stage:
            optimizer = self.optimizers().optimizer  # type: ignore[union-attr]
            if number and self.global_step == stage.first:
                optimizer.state.clear()
            settings = ("betas", "eps", "weight_decay", "momentum")
            configure(optimizer, **{key: stage.optimizer[key] for key in settings if key in stage.optimizer})
            trained = set(self._trained[number])
            if stage.trains_layers_alone:
                assert objective.layers is not None
                trained = set(within_layers(self.model, objective.layers.numbers, self._trained[number]))
            self._still = [weight for name, weight in self.model.named_parameters() if name not in trained]
            strategy = self.trainer.strategy
            if isinstance(strategy, Sharded):  # where all that trains in some stage has gradients
                strategy.keep_layers_gathered(any(isinstance(term, Layers) for term in stage.terms))
            else:
                _train_only(self.model, trained)
            self.objectives[:number] = [None] * number  # and with them a teacher that nobody needs any more
            self._stage = number
        return stage, objective

    def _clip(self) -> Tensor:
        for weight in self._still:
            weight.grad = None
        asked = getattr(self.trainer.strategy, "gradient_norm", None)
        if asked is not None:  # it clips by itself
            return asked()
        return clip_gradients(self.model.parameters(), self.gradient_clip_norm or math.inf)

    def _update(self, values: Tensor, rate: float) -> None:
        """One optimizer step, unless a number of this step or of one before it is not finite."""
        wrapped = self.optimizers()
        for group in wrapped.param_groups:  # type: ignore[union-attr]
            group["lr"] = rate
        if not self._skips_on_device(wrapped.optimizer):  # type: ignore[union-attr]
            self.settle()
            wrapped.step()  # type: ignore[union-attr]
            return
        bad = values.isfinite().all().logical_not().float()
        self._bad = bad if self._bad is None else torch.maximum(self._bad, bad)
        wrapped.optimizer.found_inf = self._bad  # type: ignore[union-attr]  # the fused update asks for it
        wrapped.step()  # type: ignore[union-attr]
        for reading in self._readings.take(but=1):
            self._read(reading)

    def _skips_on_device(self, optimizer: torch.optim.Optimizer) -> bool:
        on_gpu = self.device.type == "cuda" and not isinstance(self.trainer.strategy, Sharded)
        return on_gpu and skips_on_device(optimizer)

    def _read(self, reading: Reading) -> None:
        numbers = reading.numbers
        if not all(map(math.isfinite, numbers.values())):
            raise NotFinite(reading.step, numbers["loss"], numbers["gradient_norm"], list(reading.window))
        self.tokens_of_a_step = round(numbers.pop("tokens"))
        self.tokens += self.tokens_of_a_step
        self.shown = {**numbers, "lr": reading.rate, "tokens": float(self.tokens)}
        if reading.step % self.trainer.log_every_n_steps == 0:
            for logger in self.trainer.loggers:  # not self.log, which brings the numbers back to the device
                logger.log_metrics({f"train/{name}": value for name, value in self.shown.items()}, step=reading.step)

    def _without_sync(self, without: bool) -> AbstractContextManager[Any]:
        """Only the last micro-batch of a window exchanges gradients between ranks."""
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return block() if without and block is not None else nullcontext()


def _train_only(model: PreTrainedModel, names: set[str]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed of its own for each step and rank."""
    return hash((seed, step, rank)) & 0x7FFF_FFFF_FFFF_FFFF
