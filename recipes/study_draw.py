"""The figures of a study, drawn from its results.json alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib.figure import Figure

from recipes.study_axes import Results
from recipes.study_compare import compare
from recipes.study_curves import curves
from recipes.study_gqa import gqa_paper

DRAWN: Mapping[str, Callable[[Results], Figure]] = {"curves": curves, "gqa_paper": gqa_paper, "compare": compare}


def draw(path: Path) -> list[Path]:
    """Draws the figure that the results name beside them; the files that were written.

    Raises:
        ValueError: when no run has ended.
    """
    results = json.loads(path.read_text(encoding="utf-8"))
    if not results["arms"]:
        raise ValueError(f"{path} holds no run that has ended")
    figure = DRAWN[results["figure"]](results)
    out = path.with_name(f"{results['experiment']}.png")
    figure.savefig(out)
    return [out]
