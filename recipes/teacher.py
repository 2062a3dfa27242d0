"""The original model, which the student learns from: frozen, outside of the student's checkpoints and wrappers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recipes.attentions import attention_modules, watching
from recipes.heads import check_head, head_of
from recipes.losses import FullTeacher
from recipes.packed import Batch, hidden_packed


@dataclass
class Saw:
    """What the teacher computed of a batch, without gradients; inputs and outputs of attention layers by number."""

    head: FullTeacher  # what went into the head, and the head
    inputs: dict[int, Tensor] = field(default_factory=dict)  # [1, T, dim]
    outputs: dict[int, Tensor] = field(default_factory=dict)  # [1, T, dim]


class Teacher:
    """A causal language model in eval mode. Not a module: nothing that walks a student's modules finds it.

    Args:
        model: any causal language model with the student's vocabulary.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        if model.device.type != "meta":
            check_head(model)  # before it is compiled
        self.layers: Sequence[int] = ()  # whose inputs and outputs `look` keeps

    def to(self, device: torch.device) -> None:
        self.model.to(device)

    @torch.no_grad()
    def look(self, batch: Batch, *, layers: bool = False) -> Saw:
        """Runs the teacher on a packed batch of its device, in its own dtype whatever the student's autocast."""
        with torch.autocast(self.model.device.type, enabled=False):
            if not layers:
                return Saw(self._head(hidden_packed(self.model, batch)))
            with watching(attention_modules(self.model), self.layers, inputs=True) as watch:
                hidden = hidden_packed(self.model, batch)
        inputs = {layer: watch.input(layer) for layer in self.layers}
        return Saw(self._head(hidden), inputs, {layer: watch.output(layer) for layer in self.layers})

    def _head(self, hidden: Tensor) -> FullTeacher:
        return FullTeacher(hidden, **head_of(self.model)._asdict())
