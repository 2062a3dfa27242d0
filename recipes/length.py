"""How long to train: a fraction of the original training, a number of steps, or a number of tokens."""

from __future__ import annotations

import math


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
