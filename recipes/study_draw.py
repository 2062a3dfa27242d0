"""The figures of a study, drawn from its results.json alone."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, ScalarFormatter

from recipes.report_plot import COLOURS, TEXT, quiet, short

Results = Mapping[str, Any]
Run = Mapping[str, Any]


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


def curves(results: Results) -> Figure:
    """Held-out cross-entropy against tokens: a panel for each entry of the first axis, a line for one of the second."""
    first, second = [*results["axes"], [], []][:2]
    panels = first or [""]
    figure = Figure(figsize=(4.2 * len(panels) + 0.6, 4.4), dpi=150, layout="constrained")
    shared = None
    for number, entry in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1, sharey=shared)
        shared = shared or axes
        own = [run for run in results["arms"] if _panel(run, panels) == entry]
        for run in [one for one in results["arms"] if _panel(one, panels) is None]:
            _curve(axes, run, run["name"], "#777777", True)
        for place, run in enumerate(own):
            line = second.index(run["axes"][1]) if len(run["axes"]) > 1 else max(place, len(second))
            _curve(axes, run, run["name"].removeprefix(f"{entry}, "), COLOURS[line % len(COLOURS)], False)
        original = results["arms"][0]["evaluations"][0]
        axes.axhline(original["cross_entropy"], color="#777777", linestyle=":", linewidth=1.2)
        axes.annotate(
            f"original {original['cross_entropy']:.3f}",
            (0.99, original["cross_entropy"]),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="#777777",
        )
        axes.set_title(entry, loc="left", fontsize=11, color=TEXT)
        axes.set_xlabel("tokens trained on", color=TEXT)
        axes.set_yscale("log")
        axes.set_ylim(*_span(results))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8, labelcolor=TEXT)
        quiet(axes, grid="y")
        if number == 0:
            axes.set_ylabel("cross-entropy, nats", color=TEXT)
    return figure


def gqa_paper(results: Results) -> Figure:
    """Quality against alpha, quality and time a token against groups; means and standard deviations over the seeds."""
    figure = Figure(figsize=(13, 4.2), dpi=150, layout="constrained")
    groups, methods = results["axes"]
    by_arm = _by_name(results["arms"])
    whole = by_arm.get("8 heads", [])
    alphas = figure.add_subplot(1, 3, 1)
    fewest = groups[-1]
    for number, method in enumerate(methods):
        _spread(alphas, _points(by_arm.get(f"{fewest}, {method}", [])), f"{fewest}, {method}", COLOURS[number])
    _spread(alphas, _points(whole), "8 heads", "#777777")
    alphas.set_title("Quality and uptraining", loc="left", fontsize=11, color=TEXT)
    alphas.set_xlabel("alpha: part of the original training", color=TEXT)
    alphas.set_ylabel("cross-entropy, nats", color=TEXT)
    alphas.set_yscale("log")
    _plain_numbers(alphas)
    numbers = {group: int(group.split()[0]) for group in groups}
    heads = figure.add_subplot(1, 3, 2)
    for number, method in enumerate(methods):
        for at, style in ((0, ":"), (-1, "-")):
            points = {numbers[group]: _at(by_arm.get(f"{group}, {method}", []), at) for group in groups}
            label = f"{method}, alpha {_alpha(by_arm, at):g}"
            _spread(heads, points | {8: _at(whole, at)}, label, COLOURS[number], style)
    heads.set_title("Quality and key/value heads", loc="left", fontsize=11, color=TEXT)
    speed = figure.add_subplot(1, 3, 3)
    points = {numbers[group]: _microseconds(by_arm.get(f"{group}, {methods[0]}", [])) for group in groups}
    _spread(speed, points | {8: _microseconds(whole)}, "", COLOURS[0])
    speed.set_ylim(bottom=0)
    speed.set_title("Time a token, microseconds", loc="left", fontsize=11, color=TEXT)
    heads.set_yscale("log")
    _plain_numbers(heads)
    for axes in (heads, speed):
        axes.set_xscale("log", base=2)
        axes.set_xticks([*numbers.values(), 8], [str(n) for n in [*numbers.values(), 8]])
        axes.set_xlabel("key/value heads", color=TEXT)
    for axes in (alphas, heads, speed):
        quiet(axes, grid="y")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8, labelcolor=TEXT)
    return figure


def compare(results: Results) -> Figure:
    """Recovery curves, quality against the bytes of the cache, and quality against the speed of decoding."""
    figure = Figure(figsize=(14, 4.6), dpi=150, layout="constrained")
    left, middle, right = (figure.add_subplot(1, 3, n) for n in (1, 2, 3))
    for number, run in enumerate(results["arms"]):
        colour = COLOURS[number % len(COLOURS)]
        _curve(left, run, run["name"], colour, False)
        last = run["evaluations"][-1]
        for axes, value in ((middle, last["kv_bytes_per_token"]), (right, _decoding(run))):
            if value:
                axes.plot([value], [last["cross_entropy"]], "o", color=colour, markersize=8)
                axes.annotate(
                    run["name"],
                    (value, last["cross_entropy"]),
                    xytext=(6, 5),
                    textcoords="offset points",
                    fontsize=8,
                    color=colour,
                )
    original = results["arms"][0]["evaluations"][0]["cross_entropy"]
    left.set_yscale("log")
    left.set_ylim(*_span(results))
    _plain_numbers(left)
    left.set_title("Held-out cross-entropy, nats", loc="left", fontsize=11, color=TEXT)
    left.set_xlabel("tokens trained on", color=TEXT)
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    left.legend(frameon=False, fontsize=8, labelcolor=TEXT)
    middle.set_title("and the cache", loc="left", fontsize=11, color=TEXT)
    middle.set_xlabel("bytes of the cache a token", color=TEXT)
    right.set_title("and decoding", loc="left", fontsize=11, color=TEXT)
    right.set_xlabel("tokens/s, many sequences with long caches", color=TEXT)
    for axes in (left, middle, right):
        axes.axhline(original, color="#777777", linestyle=":", linewidth=1.2)
        quiet(axes, grid="y")
    for axes in (middle, right):
        axes.set_xlim(left=0)
        axes.margins(x=0.25, y=0.12)
    return figure


DRAWN: Mapping[str, Callable[[Results], Figure]] = {"curves": curves, "gqa_paper": gqa_paper, "compare": compare}


def _panel(run: Run, panels: Sequence[str]) -> str | None:
    """The entry of the first axis that a run belongs to, one by itself by the beginning of its name; None: to all."""
    first = run["axes"][0] if run["axes"] else run["name"].partition(",")[0]
    return first if first in panels else None


def _curve(axes: Axes, run: Run, label: str, colour: str, dashed: bool) -> None:
    tokens = [point["tokens"] for point in run["curve"]]
    values = [point["cross_entropy"] for point in run["curve"]]
    if not values:
        return
    style = "--" if dashed else "-"
    axes.plot(tokens, values, style, color=colour, linewidth=1.6, label=f"{label}: {values[-1]:.3f}")


def _span(results: Results) -> tuple[float, float]:
    """From below the best to what the middle one of all runs starts with: a mean of heads starts near nothing known."""
    ends = [run["curve"][-1]["cross_entropy"] for run in results["arms"] if run["curve"]]
    best = min([*ends, results["arms"][0]["evaluations"][0]["cross_entropy"]])
    return best * 0.97, max(best * 1.8, max(ends, default=best) * 1.05)


def _by_name(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found = defaultdict(list)
    for run in runs:
        found[run["name"]].append(run)
    return found


def _points(runs: Sequence[Run]) -> dict[float, list[float]]:
    """Cross-entropies of all seeds by alpha."""
    found = defaultdict(list)
    for run in runs:
        for point in run["curve"]:
            found[_alpha_of(run, point)].append(point["cross_entropy"])
    return dict(found)


def _alpha_of(run: Run, point: Mapping[str, float]) -> float:
    """Of a point of the curve: the run's whole alpha times the part of its tokens, to two places."""
    whole = next(float(one.removeprefix("alpha=")) for one in run["overrides"] if one.startswith("alpha="))
    return round(whole * point["tokens"] / run["curve"][-1]["tokens"], 2)


def _alpha(by_arm: Mapping[str, Sequence[Run]], at: int) -> float:
    run = next(run for runs in by_arm.values() for run in runs if run["axes"])
    return _alpha_of(run, run["curve"][at])


def _at(runs: Sequence[Run], at: int) -> list[float]:
    return [run["curve"][at]["cross_entropy"] for run in runs]


def _decoding(run: Run) -> float | None:
    """Tokens/s of the model as it was converted, or of the original where nothing was."""
    rates = [one["batch_decode_tokens_per_s"] for one in run["evaluations"]]
    return next((rate for rate in reversed(rates) if rate), None)


def _microseconds(runs: Sequence[Run]) -> list[float]:
    rates = [_decoding(run) for run in runs]
    return [1e6 / rate for rate in rates if rate]


def _spread(axes: Axes, points: Mapping[float, Sequence[float]], label: str, colour: str, style: str = "-") -> None:
    """The means as a line, their standard deviations as bars."""
    places = [place for place in sorted(points) if points[place]]
    if not places:
        return
    errors = [stdev(points[place]) if len(points[place]) > 1 else 0.0 for place in places]
    axes.errorbar(
        places,
        [mean(points[place]) for place in places],
        yerr=errors,
        color=colour,
        linestyle=style,
        marker="o",
        markersize=4,
        linewidth=1.6,
        capsize=3,
        label=label or None,
    )


def _plain_numbers(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(
        FuncFormatter(lambda value, _: f"{value:g}") if _decades(axes) < 1 else NullFormatter()
    )


def _decades(axes: Axes) -> float:
    low, high = axes.get_ylim()
    return math.log10(high / low)
