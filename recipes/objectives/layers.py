"""Squared errors of the student's attention layers against the teacher's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recipes.attentions import ADDS_THE_STREAM, Watch, attention_modules, changed_layers, feeding, watching
from recipes.packed import Batch, hidden_packed
from recipes.teacher import Saw, Teacher


class LayerErrors:
    """Compares the layers of a student that have another attention than the teacher's; all, where none has.

    What a layer's error is divided by, the mean square of the teacher's output there, is measured once, so it is the
    same for every batch, on every rank and after a resume.

    Raises ValueError for a model family whose attention layers are not known, or not outputs of their own.
    """

    def __init__(self, student: PreTrainedModel, teacher: Teacher) -> None:
        for model in (student, teacher.model):
            if model.config.model_type in ADDS_THE_STREAM:
                raise ValueError(
                    f"objective.layers cannot compare the attention of {model.config.model_type}, which adds the "
                    "residual stream to its output"
                )
        self.numbers: Sequence[int] = changed_layers(student, teacher.model)
        self.power: Tensor | None = None  # [layers], fp32
        teacher.layers = self.numbers

    def measure(self, teacher: Teacher, batches: Iterable[Batch]) -> None:
        """Measure the teacher's outputs on batches of any text, which lie on its device."""
        total, tokens = 0.0, 0
        for batch in batches:
            outputs = teacher.look(batch, layers=True).outputs
            total = total + torch.stack([outputs[layer].float().square().sum() for layer in self.numbers])
            tokens += batch["input_ids"].shape[1]
        self.power = (total / tokens).clamp_min(torch.finfo(torch.float32).tiny)  # type: ignore[union-attr]

    def forced(self, model: PreTrainedModel, batch: Batch, saw: Saw, counted: Tensor) -> Tensor:
        """The error where each layer gets what the teacher's got; gradients reach no other module than it.

        Args:
            model: the student.
            batch: packed, on its device.
            saw: what the teacher saw in this batch.
            counted: bool `[T]`, the tokens that count.

        Returns:
            fp32 scalar: the sum over tokens of the mean over layers.
        """
        modules = attention_modules(model)
        with watching(modules, self.numbers) as watch, feeding(model, modules, saw.inputs):
            hidden_packed(model, batch)
        return self._errors(watch, saw, counted)

    def own(self, model: PreTrainedModel, batch: Batch, saw: Saw, counted: Tensor) -> tuple[Tensor, Tensor]:
        """The student's last hidden states `[T, dim]` and the error where each layer gets what the student has."""
        with watching(attention_modules(model), self.numbers) as watch:
            hidden = hidden_packed(model, batch)
        return hidden, self._errors(watch, saw, counted)

    def _errors(self, watch: Watch, saw: Saw, counted: Tensor) -> Tensor:
        assert self.power is not None
        total = torch.zeros((), device=counted.device)
        for layer, power in zip(self.numbers, self.power.unbind(), strict=True):
            error = (watch.output(layer)[0].float() - saw.outputs[layer][0].float()).square().sum(-1)  # [T]
            total = total + torch.where(counted, error, 0).sum() / power
        return total / len(self.numbers)
