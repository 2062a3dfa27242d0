"""What the `explain` functions print: a line for each backend of a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


def explanation(
    backends: Mapping[str, ModuleType],
    call: Any,
    chosen: Any,
    *,
    reference: str,
    could: Callable[[str], str],
    runs: str = "runs",
) -> str:
    """Which backend runs the call, and why each other one would not.

    Args:
        backends: by name; each has `reasons(call)`, why it cannot run.
        call: what they are asked.
        chosen: the one that runs.
        reference: why the backend of that name is no choice unless it is asked for.
        could: of a backend's name: why it is not chosen although it could run.
        runs: what is said of the one that does.
    """
    lines = []
    for name, module in backends.items():
        if module is chosen:
            why = [runs]
        elif name == "reference":
            why = [f"{reference}, runs only when asked for"]
        else:
            why = module.reasons(call) or [could(name)]
        lines.append(f"{name}: {'; '.join(why)}")
    return "\n".join(lines)
