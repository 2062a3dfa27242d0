"""The picture of a report: the recovery of the perplexity, and what the cache and the speed have become."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from recipes.evaluate import Evaluation

# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
TEXT = "#333333"
HIGHEST = 1e9  # what lies above is drawn there; a logarithmic axis to 1e300 would show nothing


def plot(path: Path, evaluations: Sequence[Evaluation], curve: Sequence[Mapping[str, float]]) -> None:
    """Writes a PNG: perplexity against tokens with the models as lines, and bars of cache and decode speed."""
    panels: list[tuple[str, Callable[[Evaluation], float | None]]] = [
        ("KV cache, bytes per token", lambda one: one.kv_bytes_per_token),
        ("Decode, tokens per second", lambda one: one.decode_tokens_per_s),
    ]
    panels = [(title, value) for title, value in panels if all(value(one) is not None for one in evaluations)]
    figure = Figure(figsize=(10, 4.6), dpi=150, layout="constrained")  # without pyplot: no window, no global state
    main = figure.add_gridspec(len(panels), 2, width_ratios=(2.1, 1))
    _perplexity(figure.add_subplot(main[:, 0]), evaluations, curve)
    for row, (title, value) in enumerate(panels):
        _bars(figure.add_subplot(main[row, 1]), title, evaluations, [value(one) or 0.0 for one in evaluations])
    figure.savefig(path)


def _perplexity(axes: Axes, evaluations: Sequence[Evaluation], curve: Sequence[Mapping[str, float]]) -> None:
    axes.set_title("Perplexity on held-out text", loc="left", fontsize=11, color=TEXT)
    axes.set_yscale("log")
    last = len(evaluations) - 1
    middle = sum(point["cross_entropy"] for point in curve) / len(curve) if curve else -math.inf
    for number, one in enumerate(evaluations):
        colour = COLOURS[number % len(COLOURS)]
        if curve and number == last:
            break
        height = min(one.perplexity, HIGHEST)
        axes.axhline(height, color=colour, linestyle="--", linewidth=1.4)
        on_left = one.cross_entropy < middle  # the curve falls from the upper left to the lower right
        axes.annotate(
            f"{one.name}  {short(one.perplexity)}",
            (0.01 if on_left else 0.99, height),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="left" if on_left else "right",
            color=colour,
        )
    if curve:
        colour = COLOURS[last % len(COLOURS)]
        tokens = [point["tokens"] for point in curve]
        values = [min(math.exp(min(point["cross_entropy"], 700)), HIGHEST) for point in curve]
        axes.plot(tokens, values, color=colour, linewidth=2, marker="o", markersize=4)
        axes.annotate(
            f"{evaluations[last].name}  {short(evaluations[last].perplexity)}",
            (tokens[-1], values[-1]),
            xytext=(0, 13),
            textcoords="offset points",
            ha="right",
            color=colour,
        )
        axes.set_xlabel("tokens trained on", color=TEXT)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    else:
        axes.set_xticks([])
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.15, high * 1.35)  # room for the words above the lines
    subs = (1, 2, 5) if math.log10(high / low) < 4 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    quiet(axes, grid="y")


def _bars(axes: Axes, title: str, evaluations: Sequence[Evaluation], values: Sequence[float]) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=TEXT)
    places = range(len(values))
    axes.barh(places, values, color=[COLOURS[place % len(COLOURS)] for place in places], height=0.6)
    axes.set_yticks(list(places), [one.name for one in evaluations])
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.3 or 1.0)
    axes.set_xticks([])
    for place, value in zip(places, values, strict=True):
        exact = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        axes.annotate(exact, (value, place), xytext=(4, 0), textcoords="offset points", va="center", color=TEXT)
    quiet(axes)
    axes.spines["bottom"].set_visible(False)


def quiet(axes: Axes, grid: str | None = None) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=TEXT, which="both")
    if grid:
        axes.grid(axis=grid, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)


def short(value: float) -> str:
    """1234567 as 1.23M."""
    if value >= 1e12:
        return f"{value:.1e}"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
