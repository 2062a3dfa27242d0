"""The figure `compare`: what mechanisms cost and what they give, from one checkpoint."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from recipes.report_plot import COLOURS, TEXT, quiet, short
from recipes.study_axes import Results, against_tokens, curve, decoding, line_at, original, span

MARKERS = "osD^vP"


def compare(results: Results) -> Figure:
    """Recovery curves, quality against the bytes of the cache, and quality against the speed of decoding."""
    figure = Figure(figsize=(14, 4.8), dpi=150, layout="constrained")
    left, middle, right = (figure.add_subplot(1, 3, n) for n in (1, 2, 3))
    names = [name for axis in results["axes"] for name in axis]  # so that an arm looks alike whichever others ended
    for run in results["arms"]:
        number = names.index(run["name"]) if run["name"] in names else len(names)
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        curve(left, run, run["name"], colour)
        last = run["evaluations"][-1]
        for axes, value in ((middle, last["kv_bytes_per_token"]), (right, decoding(run))):
            if value:
                axes.plot([value], [last["cross_entropy"]], marker, color=colour, markersize=9, label=run["name"])
    left.set_ylim(*span(results))
    left.set_title("Held-out cross-entropy, nats", loc="left", fontsize=11, color=TEXT)
    against_tokens(left, results)
    line_at(left, original(results), "original")
    left.legend(frameon=False, fontsize=8, labelcolor=TEXT)
    middle.set_title("at the end, against the cache", loc="left", fontsize=11, color=TEXT)
    middle.set_xlabel("bytes of the cache a token", color=TEXT)
    right.set_title("and against decoding", loc="left", fontsize=11, color=TEXT)
    right.set_xlabel("tokens/s, many sequences with long caches", color=TEXT)
    for axes in (left, middle, right):
        quiet(axes, grid="y")
    for axes in (middle, right):
        axes.margins(x=0.1, y=0.15)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    if middle.get_legend_handles_labels()[1]:
        middle.legend(frameon=False, fontsize=8, labelcolor=TEXT)
    return figure
