"""The figure `gqa_paper`: those of arXiv 2305.13245, from runs of our own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.report_plot import COLOURS, TEXT, quiet
from recipes.study_axes import GREY, Results, Run, by_name, decoding, plain_numbers


def gqa_paper(results: Results) -> Figure:
    """Quality against alpha, quality and time a token against groups; means and standard deviations over the seeds."""
    figure = Figure(figsize=(13, 4.4), dpi=150, layout="constrained")
    groups, methods = results["axes"]
    arms = by_name(results["arms"])
    whole = arms.get("8 heads", [])
    alphas, heads, speed = (figure.add_subplot(1, 3, number) for number in (1, 2, 3))
    fewest = groups[-1]
    for number, method in enumerate(methods):
        _spread(alphas, _points(arms.get(f"{fewest}, {method}", [])), f"{fewest}, {method}", COLOURS[number])
    _spread(alphas, _points(whole), "8 heads", GREY)
    alphas.set_title("Quality and uptraining", loc="left", fontsize=11, color=TEXT)
    alphas.set_xlabel("alpha: part of the original training", color=TEXT)
    alphas.set_ylabel("cross-entropy, nats", color=TEXT)
    numbers = {group: int(group.split()[0]) for group in groups}
    runs = [run for one in arms.values() for run in one if run["axes"]]
    for number, method in enumerate(methods):
        for at, style in ((0, ":"), (-1, "-")):
            points = {numbers[group]: _at(arms.get(f"{group}, {method}", []), at) for group in groups}
            label = f"{method}, alpha {_alpha_of(runs[0], runs[0]['curve'][at]):g}" if runs else ""
            _spread(heads, points | {8: _at(whole, at)}, label, COLOURS[number], style)
    heads.set_title("Quality and key/value heads", loc="left", fontsize=11, color=TEXT)
    points = {numbers[group]: _microseconds(arms.get(f"{group}, {methods[0]}", [])) for group in groups}
    _spread(speed, points | {8: _microseconds(whole)}, "", COLOURS[0])
    speed.set_ylim(bottom=0)
    speed.set_title("Time a token, microseconds", loc="left", fontsize=11, color=TEXT)
    for axes in (alphas, heads):
        axes.set_yscale("log")
        plain_numbers(axes)
    for axes in (heads, speed):
        axes.set_xscale("log", base=2)
        axes.set_xticks([*numbers.values(), 8], [str(n) for n in [*numbers.values(), 8]])
        axes.set_xlabel("key/value heads", color=TEXT)
    for axes in (alphas, heads, speed):
        quiet(axes, grid="y")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8, labelcolor=TEXT)
    return figure


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


def _at(runs: Sequence[Run], at: int) -> list[float]:
    return [run["curve"][at]["cross_entropy"] for run in runs]


def _microseconds(runs: Sequence[Run]) -> list[float]:
    rates = [decoding(run) for run in runs]
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
