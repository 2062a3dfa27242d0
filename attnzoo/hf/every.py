"""Lists of specs for hybrid models."""

from __future__ import annotations

from attnzoo.specs import Spec


def every(step: int, spec: Spec, rest: Spec, *, num_layers: int) -> list[Spec]:
    """`spec` for every `step`-th layer, the last of each group of `step`, and `rest` for the others.

    `every(4, GQA(), GQA(mask=SlidingWindow(1024)), num_layers=32)`: layers 3, 7, ... see everything, the rest a window.

    Raises:
        ValueError: for a step or a number of layers below 1.
    """
    for name, value in (("step", step), ("num_layers", num_layers)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return [spec if layer % step == step - 1 else rest for layer in range(num_layers)]
