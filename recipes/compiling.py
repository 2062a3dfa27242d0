"""torch.compile of a model's layers: each kind of layer is compiled once, which takes seconds instead of minutes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from recipes.sharded import decoder_layers

CHOICES = ("auto", "layers", "model", "off")
MOST_KINDS = 64  # of layers, dtypes and modes (training, judging) of one run


def compile_model(model: nn.Module, choice: str | bool, *, device: str, **options: Any) -> None:
    """torch.compile `model` in place.

    Args:
        choice: "layers" for its decoder layers one by one, which share what is compiled; "model" for all of it at once,
            which starts slowly; "off"; "auto" for "layers" on a GPU and "off" elsewhere.
        device: the kind of device that it will run on.
        options: of `torch.compile`.

    Raises:
        ValueError: for another choice.
    """
    choice = {True: "layers", False: "off"}.get(choice, choice)  # type: ignore[arg-type, call-overload]
    if choice not in CHOICES:
        raise ValueError(f"trainer.compile must be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "auto":
        choice = "layers" if device == "cuda" else "off"
    if choice == "off":
        return
    # Layers of one class share their code, so the limit is on the kinds of layers of all models together.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_KINDS)
    if choice == "model":
        model.compile(**options)
        return
    # DDP exchanges a layer's gradients while those before it are computed; cutting layers up for it only costs fusion.
    torch._dynamo.config.optimize_ddp = False
    for layer in decoder_layers(model):
        layer.compile(**options)
