"""The Lightning trainer of a conf/trainer and a conf/logger group."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger
from transformers import PreTrainedModel

from recipes.checkpointing import SafetensorsIO


class ProgressBar(TQDMProgressBar):
    """Shows loss, tokens/s, learning rate and the last validation by short names."""

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description("uptraining")  # to Lightning the whole run is one epoch

    def get_metrics(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        short = {"train/tokens_per_s": "tokens/s", "val/cross_entropy": "val"}
        metrics = super().get_metrics(*args, **kwargs)
        metrics.pop("v_num", None)
        return {short.get(name, name.removeprefix("train/")): value for name, value in metrics.items()}


def build_trainer(
    config: Mapping[str, Any], *, max_steps: int, callbacks: Sequence[Callback], loggers: Sequence[Logger]
) -> Trainer:
    """A trainer that leaves optimisation, validation and checkpoints to the module and the callbacks."""
    bar = [ProgressBar(leave=True)] if config["progress_bar"] else []
    return Trainer(
        accelerator=config["accelerator"],
        devices=config["devices"],
        strategy=config["strategy"],
        precision=config["precision"],
        max_steps=max_steps,
        log_every_n_steps=config["log_every_n_steps"],
        callbacks=[*callbacks, *bar],
        logger=list(loggers),
        plugins=[SafetensorsIO()],
        enable_checkpointing=False,  # recipes.checkpointing does it
        enable_progress_bar=bool(bar),
        enable_model_summary=False,
    )


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


def prepare_for_training(model: PreTrainedModel, *, train: str, gradient_checkpointing: bool, compile: bool) -> None:
    """Freezes what does not train and turns on gradient checkpointing and torch.compile, all in place.

    Args:
        train: "all"; "layers" for all but the embeddings and the output head, which keeps a short run on little text
            from bending what all other text needs; "attention" for the parameters of the attention modules only.

    Raises:
        ValueError: for a model family whose attention modules are not known.
    """
    if train == "attention":
        from attnzoo.conversion.families import family_for

        family = family_for(model.config.model_type)
        layers = family.geometry(model.config.to_dict()).num_layers
        model.requires_grad_(False)
        for layer in range(layers):
            model.get_submodule(family.attention_path(layer)).requires_grad_(True)
    if train == "layers":
        for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
            embeddings.requires_grad_(False)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    if compile:
        model.compile()


def is_main_process() -> bool:
    """False in the processes that Lightning starts for the other devices of a run."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def world_size(devices: int | Sequence[int]) -> int:
    """How many processes train."""
    return devices if isinstance(devices, int) else len(devices)
