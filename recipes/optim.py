"""AdamW and its learning rate: warm-up, then cosine, linear or constant."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

SCHEDULES = ("cosine", "linear", "constant")


def adamw(model: nn.Module, *, lr: float, betas: Iterable[float], eps: float, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that train; norms and biases (fewer than two dimensions) do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    first, second = betas
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=lr,
        betas=(first, second),
        eps=eps,
        fused=_can_fuse(trained),
    )


def learning_rate_factor(step: int, *, total_steps: int, schedule: str, warmup: float, final: float) -> float:
    """What the learning rate is multiplied with at optimizer step `step` (0 is the first).

    Args:
        step: optimizer step, from 0.
        total_steps: steps of the whole run.
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
