"""The terms of an objective as a config names them: conf/objective, and `objective` of a stage.

{ce: {weight: 0.5}, kl: {weight: {from: 1.0, to: 0.5}, temperature: 1.0}}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

Weight = float | Mapping[str, float]


@dataclass(frozen=True)
class Term:
    """A part of an objective.

    weight: a number of at least 0; or `{from: a, to: b}`, which goes from a at the first step of the stage to b at the
        last, in equal steps.
    """

    name: ClassVar[str]
    weight: Weight = 1.0

    def __post_init__(self) -> None:
        ends = [self.weight] if not isinstance(self.weight, Mapping) else list(self.weight.values())
        named = not isinstance(self.weight, Mapping) or set(self.weight) == {"from", "to"}
        if not named or not all(_is_number(end) and end >= 0 for end in ends) or not any(ends):
            self._refuse("weight", self.weight, "a number above 0 or {from: a, to: b} with numbers of at least 0")

    def weight_at(self, progress: float) -> float:
        """The weight after that part of the stage: 0 at its first step, 1 at its last."""
        if not isinstance(self.weight, Mapping):
            return float(self.weight)
        return self.weight["from"] + (self.weight["to"] - self.weight["from"]) * progress

    def _refuse(self, key: str, came: object, allowed: str) -> None:
        raise ValueError(f"objective.{self.name}.{key} must be {allowed}, got {came!r}")


@dataclass(frozen=True)
class CE(Term):
    """Cross-entropy of the next token, in nats."""

    name: ClassVar[str] = "ce"


@dataclass(frozen=True)
class KL(Term):
    """KL(teacher || student) of the next token, in nats, over the whole vocabulary (arXiv 1503.02531).

    temperature: divides both models' logits; the term is multiplied by its square, so that gradients keep their size.
    """

    name: ClassVar[str] = "kl"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _is_number(self.temperature) or self.temperature <= 0:
            self._refuse("temperature", self.temperature, "a number above 0")


@dataclass(frozen=True)
class TopKL(KL):
    """The same over the teacher's k most probable tokens and all others as one, which were stored before training.

    k: how many; with the whole vocabulary it is KL.
    """

    name: ClassVar[str] = "kl_topk"
    k: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            self._refuse("k", self.k, "a whole number of at least 1")


@dataclass(frozen=True)
class Layers(Term):
    """Squared error of each attention layer's output against the teacher's, over the mean square of the teacher's.

    Averaged over layers, so 1 is what outputs of zero would cost.

    inputs: "teacher" gives each layer what the teacher's layer got (RADLADS, arXiv 2505.03005; attention transfer,
        arXiv 2410.10254); "own" what the student has there, errors of the layers before it included.
    """

    name: ClassVar[str] = "layers"
    inputs: str = "teacher"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inputs not in ("teacher", "own"):
            self._refuse("inputs", self.inputs, "teacher or own")


TERMS: dict[str, type[Term]] = {term.name: term for term in (CE, KL, TopKL, Layers)}


def read_terms(config: Mapping[str, Any]) -> tuple[Term, ...]:
    """The terms that a config names, as `{name: {field: value}}`; null takes a term out again.

    Raises ValueError for an unknown name or field, a bad value, two terms of the same kind, and for no term at all.
    """
    terms = []
    for name, values in config.items():
        if name not in TERMS:
            raise ValueError(f"objective.{name} is no term of an objective; allowed are {', '.join(TERMS)}")
        if values is None:
            continue
        known = [field.name for field in fields(TERMS[name])]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"objective.{name}.{unknown[0]} is no field; allowed are {', '.join(known)}")
        terms.append(TERMS[name](**values))
    if not terms:
        raise ValueError(f"objective names no term; allowed are {', '.join(TERMS)}")
    if sum(isinstance(term, KL) for term in terms) > 1:
        raise ValueError("objective has both kl and kl_topk; take one of them")
    return tuple(terms)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
