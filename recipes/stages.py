"""Stages of a run: each with its objective, its optimizer's settings and its parameters, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.length import divide
from recipes.objectives import Layers, Term, TopKL, read_terms
from recipes.optim import learning_rate_factor

FIELDS = ("share", "max_steps", "max_tokens", "train", "objective", "optimizer")
ONLY = "uptraining"  # the name of a run's stage that has no other


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    name: what the curve calls it.
    first, steps: its first optimizer step, counted from 0 at the beginning of the run, and how many it has.
    terms: of its objective.
    train: what trains, see `recipes.trained`.
    optimizer: the fields of conf/optimizer.
    """

    name: str
    first: int
    steps: int
    terms: tuple[Term, ...]
    train: str | tuple[str, ...]
    optimizer: Mapping[str, Any]

    @property
    def end(self) -> int:
        """The first step that is no longer in it."""
        return self.first + self.steps

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher has to run beside the student."""
        return any(term.name in ("kl", "layers") for term in self.terms)

    @property
    def trains_layers_alone(self) -> bool:
        """Whether gradients reach nothing but attention layers."""
        return all(isinstance(term, Layers) and term.inputs == "teacher" for term in self.terms)

    @property
    def leaves_some_out(self) -> bool:
        """Whether some parameters may get no gradient."""
        return all(isinstance(term, Layers) for term in self.terms)

    @property
    def top(self) -> TopKL | None:
        """The term that needs stored probabilities."""
        return next((term for term in self.terms if isinstance(term, TopKL)), None)

    def progress(self, step: int) -> float:
        """0 at its first step, 1 at its last."""
        return (step - self.first) / max(1, self.steps - 1)

    def learning_rate(self, step: int) -> float:
        """Of a step of the run; warm-up and schedule are over the stage."""
        shape = {key: self.optimizer[key] for key in ("schedule", "warmup", "final")}
        return self.optimizer["lr"] * learning_rate_factor(step - self.first, total_steps=self.steps, **shape)


def plan_stages(config: Mapping[str, Any], *, steps: int | None, tokens_per_step: int) -> list[Stage]:
    """The stages of a run, in order; one, where the config has none.

    Args:
        config: with stages, objective, train and optimizer; what a stage leaves open is the config's.
        steps: optimizer steps of the whole run; None where the stages say it.
        tokens_per_step: tokens that one step takes in, over all micro-batches and ranks.

    Raises:
        ValueError: for an unknown field, lengths that do not add up, and a bad objective.
    """
    given = config["stages"] or {ONLY: {}}
    for name, fields in given.items():
        unknown = sorted(set(fields) - set(FIELDS))
        if unknown:
            raise ValueError(f"stages.{name}.{unknown[0]} is no field of a stage; allowed are {', '.join(FIELDS)}")
    stages: list[Stage] = []
    for name, length in divide(given, steps=steps, tokens_per_step=tokens_per_step).items():
        fields = given[name]
        train = fields.get("train") or config["train"]
        stages.append(
            Stage(
                name=name,
                first=stages[-1].end if stages else 0,
                steps=length,
                terms=read_terms(fields.get("objective") or config["objective"]),
                train=train if isinstance(train, str) else tuple(train),
                optimizer={**config["optimizer"], **(fields.get("optimizer") or {})},
            )
        )
    return stages


def stage_at(stages: Sequence[Stage], step: int) -> int:
    """The number of the stage that a step is in; of the last one behind its end."""
    return next((number for number, stage in enumerate(stages) if step < stage.end), len(stages) - 1)
