"""The loss of a micro-batch: what its terms need is computed once, then added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recipes.heads import head_of
from recipes.losses import FullTeacher, TopTeacher, linear_cross_entropy, linear_mixture
from recipes.objectives.layers import LayerErrors
from recipes.objectives.terms import CE, KL, Layers, Term, TopKL
from recipes.packed import IGNORED, Batch, hidden_packed, shifted_labels
from recipes.teacher import Saw, Teacher

Kind = TypeVar("Kind", bound=Term)


class Loss(NamedTuple):
    """Sums over the target tokens of a micro-batch, fp32 scalars."""

    total: Tensor  # carries the gradient
    terms: dict[str, Tensor]  # each term without its weight; the cross-entropy wherever logits were made


class Objective:
    """A weighted sum of terms.

    Args:
        terms: see `read_terms`.
        teacher: the original; may be None where no term asks for it.
        layers: what compares attention layers, for the term `Layers`.
    """

    def __init__(
        self, terms: Sequence[Term], *, teacher: Teacher | None = None, layers: LayerErrors | None = None
    ) -> None:
        self.teacher = teacher
        self.layers = layers
        self._ce, self._kl, self._layers = (_of(kind, terms) for kind in (CE, KL, Layers))

    def __call__(self, model: PreTrainedModel, batch: Batch, progress: float = 0.0) -> Loss:
        """The loss of a packed batch on the model's device; `progress` through the stage goes from 0 to 1."""
        targets = shifted_labels(batch)
        saw = self._look(batch)
        total, terms, hidden = torch.zeros((), device=targets.device), {}, None
        if self._layers is not None:
            assert self.layers is not None and saw is not None
            counted = targets != IGNORED
            if self._layers.inputs == "own":
                hidden, errors = self.layers.own(model, batch, saw, counted)
            else:
                errors = self.layers.forced(model, batch, saw, counted)
            total = total + self._layers.weight_at(progress) * errors
            terms["layers"] = errors.detach()
        if self._ce is not None or self._kl is not None:
            hidden = hidden_packed(model, batch) if hidden is None else hidden
            loss, of_head = self._head_loss(model, hidden, targets, batch, saw, progress)
            total, terms = total + loss, terms | of_head
        return Loss(total, terms)

    def _look(self, batch: Batch) -> Saw | None:
        full = self._kl is not None and not isinstance(self._kl, TopKL)
        if not full and self._layers is None:
            return None
        assert self.teacher is not None
        return self.teacher.look(batch, layers=self._layers is not None)

    def _head_loss(
        self, model: PreTrainedModel, hidden: Tensor, targets: Tensor, batch: Batch, saw: Saw | None, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rest = head_of(model)._asdict()
        weight = rest.pop("weight")
        ce_weight = 0.0 if self._ce is None else self._ce.weight_at(progress)
        if self._kl is None:
            loss = linear_cross_entropy(hidden, weight, targets, **rest)
            return ce_weight * loss, {"ce": loss.detach()}
        if isinstance(self._kl, TopKL):
            teacher: FullTeacher | TopTeacher = _stored(batch)
        else:
            assert saw is not None
            teacher = saw.head
        square = self._kl.temperature**2
        mixed = linear_mixture(
            *(hidden, weight, targets, teacher),
            ce_weight=ce_weight,
            kl_weight=self._kl.weight_at(progress) * square,
            temperature=self._kl.temperature,
            **rest,
        )
        return mixed.total, {"ce": mixed.cross_entropy, self._kl.name: mixed.kl * square}


def next_token(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Cross-entropy in nats, summed over the target tokens of a packed batch."""
    return Objective([CE()])(model, batch).total


def _stored(batch: Batch) -> TopTeacher:
    if "teacher_ids" not in batch:
        raise ValueError("teacher.cache has no probabilities of a piece of this text")
    return TopTeacher(batch["teacher_ids"], batch["teacher_logprobs"])


def _of(kind: type[Kind], terms: Sequence[Term]) -> Kind | None:
    return next((term for term in terms if isinstance(term, kind)), None)
