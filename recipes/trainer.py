"""The Lightning trainer of a conf/trainer and a conf/logger group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from transformers import PreTrainedModel

from recipes import parallel
from recipes.checkpointing import SafetensorsIO
from recipes.compiling import compile_model
from recipes.meters import Meters, clock
from recipes.sharded import Replicated, Sharded


class ProgressBar(TQDMProgressBar):
    """Shows loss, speed, learning rate, memory, time left and the last validation by short names."""

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description("uptraining")  # to Lightning the whole run is one epoch

    def get_metrics(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        short = {"tokens_per_s": "tokens/s", "memory_gib": "GiB", "seconds_left": "left", "val/cross_entropy": "val"}
        trainer, module = args
        metrics = dict(getattr(module, "shown", {}))
        for meters in trainer.callbacks:
            metrics |= meters.shown if isinstance(meters, Meters) else {}
        metrics |= super().get_metrics(*args, **kwargs)
        metrics.pop("v_num", None)
        if "seconds_left" in metrics:
            metrics["seconds_left"] = clock(metrics["seconds_left"])
        return {short.get(name, name.removeprefix("train/")): value for name, value in metrics.items()}


def build_trainer(
    config: Mapping[str, Any], *, max_steps: int, callbacks: Sequence[Callback], loggers: Sequence[Logger]
) -> Trainer:
    """A trainer that leaves optimisation, validation and checkpoints to the module and the callbacks."""
    bar = [ProgressBar(leave=True)] if config["progress_bar"] else []
    launcher = parallel.launcher()
    return Trainer(
        accelerator=config["accelerator"],
        devices=config["devices"],
        num_nodes=config["num_nodes"],
        strategy=build_strategy(config),
        precision=config["precision"],
        max_steps=max_steps,
        log_every_n_steps=config["log_every_n_steps"],
        callbacks=[*callbacks, *bar],
        logger=list(loggers),
        plugins=[SafetensorsIO(), *([launcher] if launcher else [])],
        enable_checkpointing=False,  # recipes.checkpointing does it
        enable_progress_bar=bool(bar),
        enable_model_summary=False,
    )


def build_strategy(config: Mapping[str, Any]) -> Strategy | str:
    """Lightning's strategy by a conf/trainer group's: auto, ddp, fsdp, deepspeed, or any other of Lightning's names."""
    name = config["strategy"]
    if name == "auto" and parallel.world_size(config) > 1:
        name = "ddp"
    backend = parallel.backend(parallel.uses_gpu(config["accelerator"]))
    if name == "ddp":
        return Replicated(process_group_backend=backend, gradient_as_bucket_view=True)
    if name == "fsdp":
        return Sharded(
            mixed=config["precision"] == "bf16-mixed",
            reshard_after_forward=config.get("reshard_after_forward", True),
            shard_teacher=config.get("shard_teacher", False),
            process_group_backend=backend,
        )
    if name == "deepspeed":
        from recipes.zero import Zero

        clip = config["gradient_clip_norm"]
        return Zero(stage=config.get("stage", 2), gradient_clip_norm=clip, process_group_backend=backend)
    return name


def trained_model(trainer: Trainer, model: PreTrainedModel) -> PreTrainedModel | None:
    """The model that was trained, whole, on the main process; call it in all of them."""
    gather = getattr(trainer.strategy, "gather_model", None)
    return model if gather is None else gather()


def build_loggers(config: Mapping[str, Any] | None, *, folder: Path, first_step: int) -> list[Logger]:
    """The loggers of a conf/logger group, writing to `folder`.

    A resumed run writes to a folder of its own, from_step_N: the CSV logger would delete what the first part wrote.
    """
    place = {"save_dir": str(folder), "version": f"from_step_{first_step}"}
    return [
        instantiate(logger, **{k: v for k, v in place.items() if k not in logger}) for logger in (config or {}).values()
    ]


def choose_precision(precision: str, accelerator: str) -> str:
    """`auto` becomes bf16 autocast where the hardware multiplies bf16, else fp32; anything else stays."""
    if precision != "auto":
        return precision
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif accelerator in ("auto", "cpu"):
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        fast = False
    return "bf16-mixed" if fast else "32-true"


@contextmanager
def as_trained(config: Mapping[str, Any]) -> Iterator[str]:
    """Inside it a model computes in the precision of training; the value is the kind of device that trains."""
    on_gpu = config["accelerator"] in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    with torch.autocast(device, torch.bfloat16, enabled=config["precision"] == "bf16-mixed"):
        yield device


def prepare_for_training(
    model: PreTrainedModel, *, gradient_checkpointing: bool, compile: str | bool, accelerator: str
) -> None:
    """Turns on gradient checkpointing and torch.compile, in place."""
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    compile_model(model, compile, device="cuda" if parallel.uses_gpu(accelerator) else "cpu")
