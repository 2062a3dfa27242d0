"""The figure `curves`: which start and which objective win back the most."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from recipes.report_plot import COLOURS, TEXT, quiet
from recipes.study_axes import GREY, Results, Run, against_tokens, curve, line_at, original, span

STYLES = ("-", "--", "-.")  # of lines that colours no longer tell apart


def curves(results: Results) -> Figure:
    """Held-out cross-entropy against tokens: a panel for each entry of the first axis, a line for one of the second.

    An arm by itself stands in the panel that its name begins with, else, dashed and grey, in all. A thin line shows
    where the first arm of the grid ends, for the others to pass.
    """
    first, second = [*results["axes"], [], []][:2]
    panels = first or [""]
    figure = Figure(figsize=(4.2 * len(panels) + 0.6, 4.8), dpi=150, layout="constrained")
    shared = None
    for number, entry in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1, sharey=shared)
        shared = shared or axes
        for run in [one for one in results["arms"] if _panel(one, panels) is None]:
            curve(axes, run, run["name"], GREY, "--")
        more = len(second)
        for run in [run for run in results["arms"] if _panel(run, panels) == entry]:
            line = second.index(run["axes"][1]) if len(run["axes"]) > 1 else more
            more += len(run["axes"]) < 2
            label = run["name"].removeprefix(f"{entry}, ")
            curve(axes, run, label, COLOURS[line % len(COLOURS)], STYLES[line // len(COLOURS) % len(STYLES)])
        axes.set_ylim(*span(results))
        line_at(axes, original(results), "original")
        baseline = next((run for run in results["arms"] if run["axes"] and run["curve"]), None)
        if baseline is not None:
            line_at(axes, baseline["curve"][-1]["cross_entropy"], f"end of {baseline['name']}", "-.")
        axes.set_title(entry, loc="left", fontsize=11, color=TEXT)
        against_tokens(axes, results)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8, labelcolor=TEXT)
        quiet(axes, grid="y")
        if number == 0:
            axes.set_ylabel("cross-entropy, nats", color=TEXT)
    return figure


def _panel(run: Run, panels: Sequence[str]) -> str | None:
    """The entry of the first axis that a run belongs to, one by itself by the beginning of its name; None: to all."""
    first = run["axes"][0] if run["axes"] else run["name"].partition(",")[0]
    return first if first in panels else None
