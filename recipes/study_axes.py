"""What the figures of the studies have in common: runs by name, curves against tokens, plain numbers on an axis."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, ScalarFormatter

from recipes.report_plot import TEXT, short

Results = Mapping[str, Any]  # of a study, as recipes.study_results collects them
Run = Mapping[str, Any]  # one of their arms

GREY = "#777777"


def curve(axes: Axes, run: Run, label: str, colour: str, style: str = "-") -> None:
    """Held-out cross-entropy against tokens; the legend says where it ends."""
    tokens = [point["tokens"] for point in run["curve"]]
    values = [point["cross_entropy"] for point in run["curve"]]
    if values:
        axes.plot(tokens, values, style, color=colour, linewidth=1.6, label=f"{label}: {values[-1]:.3f}")


def against_tokens(axes: Axes, results: Results) -> None:
    """Tokens trained on, on a logarithmic axis from the first measurement on and a linear one before it."""
    tokens = [point["tokens"] for run in results["arms"] for point in run["curve"] if point["tokens"]]
    if tokens:
        axes.set_xscale("symlog", linthresh=min(tokens), linscale=0.5)
        ticks = [part * 10.0**decade for decade in range(2, 15) for part in (1, 3)]
        axes.set_xticks([0, *(tick for tick in ticks if min(tokens) <= tick <= max(tokens))])
        axes.set_xlim(0, max(tokens) * 1.1)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel("tokens trained on", color=TEXT)


def line_at(axes: Axes, value: float, words: str, style: str = ":") -> None:
    """A thin line across, which the legend explains."""
    axes.axhline(value, color=GREY, linestyle=style, linewidth=1.1, label=f"{words}: {value:.3f}")


def span(results: Results) -> tuple[float, float]:
    """From below the best to what the middle one of all runs starts with: a mean of heads starts near nothing known."""
    ends = [run["curve"][-1]["cross_entropy"] for run in results["arms"] if run["curve"]]
    best = min([*ends, original(results)])
    return best * 0.97, max(best * 1.8, max(ends, default=best) * 1.05)


def original(results: Results) -> float:
    """Cross-entropy of the model that all runs start from."""
    return float(results["arms"][0]["evaluations"][0]["cross_entropy"])


def by_name(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each arm, one a seed."""
    found = defaultdict(list)
    for run in runs:
        found[run["name"]].append(run)
    return found


def decoding(run: Run) -> float | None:
    """Tokens/s of the model as it was converted, or of the original where nothing was."""
    rates = [one["batch_decode_tokens_per_s"] for one in run["evaluations"]]
    return next((rate for rate in reversed(rates) if rate), None)


def plain_numbers(axes: Axes) -> None:
    """2, 3, 4 on a logarithmic axis of values, not powers of ten."""
    low, high = axes.get_ylim()
    narrow = math.log10(high / low) < 1
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}") if narrow else NullFormatter())
