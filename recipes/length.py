"""How long to train: a fraction of the original training, a number of steps, or a number of tokens; and each stage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LENGTHS = ("share", "max_steps", "max_tokens")


def training_steps(
    *,
    alpha: float | None,
    max_steps: int | None,
    max_tokens: float | None,
    tokens_per_step: int,
    original_steps: float | None = None,
    original_tokens: float | None = None,
) -> int:
    """The number of optimizer steps that exactly one of `alpha`, `max_steps` and `max_tokens` asks for.

    Args:
        alpha: fraction of the original training (arXiv 2305.13245), of its steps where they are known, else of its
            tokens; 0 trains nothing.
        max_steps: optimizer steps.
        max_tokens: tokens, padding included; rounded up to whole steps.
        tokens_per_step: tokens that one step takes in, over all micro-batches and ranks.
        original_steps: steps of the original training.
        original_tokens: tokens of the original training.

    Raises:
        ValueError: when none or several are given, one is negative, or alpha is given for a model whose training is
            not known.
    """
    given = {"alpha": alpha, "max_steps": max_steps, "max_tokens": max_tokens}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        came = ", ".join(f"{name}={value}" for name, value in given.items()) or "none"
        hint = "; set the others to null (an experiment may set one: max_steps=null)" if given else ""
        raise ValueError(f"give exactly one of alpha, max_steps, max_tokens; got {came}{hint}")
    name, value = next(iter(given.items()))
    if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
    if name == "max_steps":
        if value != int(value):
            raise ValueError(f"max_steps must be a whole number, got {value!r}")
        return int(value)
    if name == "max_tokens":
        return math.ceil(value / tokens_per_step)
    if original_steps is not None:
        return math.ceil(value * original_steps)
    if original_tokens is not None:
        return math.ceil(value * original_tokens / tokens_per_step)
    raise ValueError(
        f"alpha={value} is a fraction of the original training: give model.original_tokens or model.original_steps, "
        "or give max_steps or max_tokens instead of alpha"
    )


def divide(stages: Mapping[str, Mapping[str, Any]], *, steps: int | None, tokens_per_step: int) -> dict[str, int]:
    """The optimizer steps of each stage; those of no steps are left out, but for a run that has none at all.

    Args:
        stages: by name. Each has at most one of share (of the run), max_steps and max_tokens; one may have none, and
            gets the rest.
        steps: of the whole run; None: every stage has max_steps or max_tokens, and the run their sum.
        tokens_per_step: tokens that one step takes in, over all micro-batches and ranks.

    Raises:
        ValueError: for a stage with several lengths or a bad one, and for lengths that are not the run's.
    """
    lengths: dict[str, int | None] = {}
    shares = 0.0
    for name, fields in stages.items():
        given = {key: fields[key] for key in LENGTHS if fields.get(key) is not None}
        if len(given) > 1:
            came = ", ".join(f"{key}={value}" for key, value in given.items())
            raise ValueError(f"stages.{name} must have one of share, max_steps and max_tokens, got {came}")
        if "share" in given:
            shares += _share(name, given["share"])
            if steps is None:
                raise ValueError(f"stages.{name}.share is a part of the run: give its alpha, max_steps or max_tokens")
            end = round(shares * steps)  # not the sum of rounded parts
            lengths[name] = end - round((shares - given["share"]) * steps)
        elif given:
            whole = {"alpha": None, "max_steps": None, "max_tokens": None} | given
            lengths[name] = training_steps(**whole, tokens_per_step=tokens_per_step)
        else:
            lengths[name] = None
    known = sum(length for length in lengths.values() if length is not None)
    open_ended = [name for name, length in lengths.items() if length is None]
    if len(open_ended) > 1 or (open_ended and steps is None):
        raise ValueError(f"stages.{open_ended[-1]} has no share, max_steps or max_tokens; only one stage may have none")
    if steps is not None and (known > steps or (known != steps and not open_ended)):
        raise ValueError(f"the stages have {known} steps together, and the run has {steps}")
    found = {name: (steps or 0) - known if length is None else length for name, length in lengths.items()}
    return {name: length for name, length in found.items() if length} or dict(list(found.items())[:1])


def _share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"stages.{name}.share must be a part of the run, above 0 and at most 1, got {value!r}")
    return value
