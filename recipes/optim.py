"""AdamW and its learning rate: warm-up, then cosine, linear or constant."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

SCHEDULES = ("cosine", "linear", "constant")


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """Fused AdamW, for `configure`. Norms and biases (fewer than two dimensions) have a group of their own."""
    trained = list(parameters)
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "decays": True},
        {"params": [p for p in trained if p.dim() < 2], "decays": False},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=_can_fuse(trained))


def configure(optimizer: torch.optim.Optimizer, *, betas: Iterable[float], eps: float, weight_decay: float) -> None:
    """Set what a stage asks for, but for the learning rate; norms and biases do not decay."""
    first, second = betas
    for group in optimizer.param_groups:
        group["betas"], group["eps"] = (first, second), eps
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def learning_rate_factor(step: int, *, total_steps: int, schedule: str, warmup: float, final: float) -> float:
    """What the learning rate is multiplied with at optimizer step `step` (0 is the first).

    Args:
        step: optimizer step, from 0.
        total_steps: steps of the run, or of its stage.
        schedule: "cosine" and "linear" fall from 1 to `final` over what follows the warm-up; "constant" stays at 1.
        warmup: fraction of the run over which the rate rises linearly; its first step is not 0.
        final: factor that a falling schedule ends at.
    """
    warmup_steps = round(warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    fallen = progress if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
    return 1 - (1 - final) * fallen


def _can_fuse(parameters: list[nn.Parameter]) -> bool:
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
