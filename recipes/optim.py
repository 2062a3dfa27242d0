"""The optimizer and its learning rate: warm-up, then cosine, linear or constant."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from recipes.muon import MuonAdamW

METHODS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "constant")


def build_optimizer(model: PreTrainedModel, method: str) -> torch.optim.Optimizer:
    """The optimizer of all parameters that train, for `configure`.

    Args:
        method: "adamw", fused where it can be; "muon": Muon for the matrices of the layers, AdamW for embeddings, head,
            norms, biases and whatever is no matrix.

    Raises:
        ValueError: for "muon" and weights that are sharded, whose matrices no process has.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = _can_fuse(trained)
    if method == "adamw":
        return torch.optim.AdamW(_groups(trained), fused=fused)
    if any(isinstance(parameter, DTensor) for parameter in trained):
        raise ValueError("optimizer.method=muon needs whole matrices: take adamw, or trainer=ddp")
    ends = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    matrices = [parameter for parameter in trained if parameter.dim() == 2 and id(parameter) not in ends]
    inside = {id(parameter) for parameter in matrices}
    others = _groups([parameter for parameter in trained if id(parameter) not in inside])
    groups = [{"params": matrices, "decays": True, "orthogonal": True}, *({**g, "orthogonal": False} for g in others)]
    return MuonAdamW([group for group in groups if group["params"]], fused=fused)


def configure(
    optimizer: torch.optim.Optimizer,
    *,
    betas: Iterable[float],
    eps: float,
    weight_decay: float,
    momentum: float | None = None,
) -> None:
    """Set what a stage asks for, but for the learning rate; norms and biases do not decay."""
    first, second = betas
    for group in optimizer.param_groups:
        group["betas"], group["eps"] = (first, second), eps
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
        if momentum is not None:
            group["momentum"] = momentum


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of the optimizer is left out where its `found_inf` is 1, without the host asking for it."""
    return isinstance(optimizer, torch.optim.AdamW | MuonAdamW) and bool(optimizer.defaults["fused"])


def _groups(trained: list[nn.Parameter]) -> list[dict[str, Any]]:
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "decays": True},
        {"params": [p for p in trained if p.dim() < 2], "decays": False},
    ]
    return [group for group in groups if group["params"]]


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
