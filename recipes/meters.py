"""How fast a run trains, how much of the hardware that takes, and how long it will go on."""

from __future__ import annotations

import resource
import sys
import time
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from attnzoo.planning import read_model
from recipes.module import Uptraining

# Matrix products in 1e12 FLOP/s, dense, by the names that GPUs give: bf16 with tensor cores, fp32 without (NVIDIA's
# data sheets). A name comes before those that it contains.
PEAKS = (
    ("B200", 2250, None),
    ("GH200", 989, 67),
    ("H200", 989, 67),
    ("H100 PCIe", 756, 51),
    ("H100 NVL", 835, 60),
    ("H100", 989, 67),
    ("H800", 989, 67),
    ("A100", 312, 19.5),
    ("A800", 312, 19.5),
    ("A40", 149.7, 37.4),
    ("A30", 165, 10.3),
    ("A10G", 70, 31.5),
    ("A10", 125, 31.2),
    ("L40S", 362, 91.6),
    ("L40", 181, 90.5),
    ("L4", 121, 30.3),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71, 35.6),
)
GIB = 2**30


class Meters(Callback):
    """Speed, MFU, memory and time left, logged and kept in `shown` for the progress bar.

    - tokens_per_s: of all processes, since the last logged step; validation and checkpoints are not counted.
    - mfu: the model's FLOPs over what the GPUs can do (arXiv 2204.02311): forward, and backward to what trains, at
      documents as long as a row. Neither what is recomputed nor a teacher counts. Missing where the GPU's peak or the
      model's FLOPs are not known.
    - memory_gib: most that this process held so far: on its GPU, or where there is none, in main memory.
    - seconds_left: at the pace of this process so far, validation and checkpoints included.

    It reads no tensor, so nothing waits for a GPU. Put it before the callbacks that take time, and `rest` behind them.

    Args:
        precision: of the trainer.
        seq_len: tokens of a row.
    """

    def __init__(self, *, precision: str, seq_len: int) -> None:
        self.precision = precision
        self.seq_len = seq_len
        self.shown: dict[str, float] = {}
        self.rest = _Rest(self)
        self._flops: float | None = None  # of a token
        self._peak: float | None = None  # FLOP/s of all devices
        self._started = self._awake_since = 0.0
        self._first_step = self._tokens = 0
        self._seconds = 0.0

    def on_train_start(self, trainer: Trainer, module: Uptraining) -> None:  # type: ignore[override]
        self._flops = training_flops(module.model, self.seq_len)
        device = module.device
        if device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(device), self.precision)
            self._peak = None if peak is None else peak * trainer.world_size
            torch.cuda.reset_peak_memory_stats(device)
        self._started = time.monotonic()
        self._first_step, self._tokens = trainer.global_step, module.tokens

    def on_train_batch_end(self, trainer: Trainer, module: Uptraining, *_: Any) -> None:  # type: ignore[override]
        self._seconds += time.monotonic() - self._awake_since
        step = trainer.global_step
        if step % trainer.log_every_n_steps or module.tokens == self._tokens:
            return
        speed = (module.tokens - self._tokens) / self._seconds
        self._tokens, self._seconds = module.tokens, 0.0
        pace = (time.monotonic() - self._started) / (step - self._first_step)
        self.shown = {"tokens_per_s": speed, "memory_gib": _memory(module.device) / GIB}
        if self._flops is not None and self._peak is not None:
            self.shown["mfu"] = speed * self._flops / self._peak
        self.shown["seconds_left"] = pace * (module.total_steps - step)
        for logger in trainer.loggers:
            logger.log_metrics({f"train/{name}": value for name, value in self.shown.items()}, step=step)


class _Rest(Callback):
    """Starts a meter's clock again when the callbacks before this one are done."""

    def __init__(self, meters: Meters) -> None:
        self.meters = meters

    def on_train_start(self, *_: Any) -> None:
        self.meters._awake_since = time.monotonic()

    def on_train_batch_end(self, *_: Any) -> None:
        self.meters._awake_since = time.monotonic()


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as a progress bar shows them."""
    return str(timedelta(seconds=round(seconds)))


def peak_flops(gpu: str, precision: str) -> float | None:
    """FLOP/s of a GPU by its name, None for one that is not in the table.

    Args:
        gpu: as `torch.cuda.get_device_name` gives it.
        precision: of the trainer, "bf16-mixed" or "32-true"; TF32 counts where PyTorch may use it.
    """
    found = next((row for row in PEAKS if row[0] in gpu), None)
    if found is None:
        return None
    _, bf16, fp32 = found
    if precision == "bf16-mixed":
        return bf16 * 1e12
    if torch.backends.cuda.matmul.allow_tf32:
        return bf16 * 1e12 / 2
    return None if fp32 is None else fp32 * 1e12


def training_flops(model: nn.Module, seq_len: int) -> float | None:
    """FLOPs of a token's forward and backward pass, None for a model that the planner does not know.

    What does not train needs no gradient of its weights: a third of a product's FLOPs.
    """
    try:
        known = read_model(model.config.to_dict())
    except (ValueError, KeyError, TypeError):
        return None
    attention = sum(count * one.flops(seq_len) for one, count in known.attentions.items()) / seq_len
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    trained = sum(parameter.numel() for parameter in matrices if parameter.requires_grad)
    share = trained / max(1, sum(parameter.numel() for parameter in matrices))
    return 2 * known.weights.matmul * (2 + share) + 3 * attention


def _memory(device: torch.device) -> int:
    """Bytes at most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
