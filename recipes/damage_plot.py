"""The picture of conversions' damage: what text costs behind each, and where in the model it arises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnzoo.conversion.damage import Damage
from recipes.report_plot import COLOURS, TEXT


def plot(path: Path, damages: Sequence[Damage]) -> None:
    """Writes a PNG: cross-entropies as bars, and the attention's and the stream's errors by layer."""
    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")  # without pyplot: no window, no global state
    bars, attention, stream = figure.subplots(1, 3, width_ratios=(1, 1.3, 1.3))
    _bars(bars, damages)
    for axes, title, name in (
        (attention, "Error of each layer's attention", "attention_error"),
        (stream, "Error of the sum behind each layer", "stream_error"),
    ):
        for number, one in enumerate(damages):
            values = [getattr(layer, name) for layer in one.layers]
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(
                range(len(values)), values, color=colour, linewidth=1.8, marker="o", markersize=3, label=one.method
            )
        axes.set_yscale("log" if all(getattr(x, name) > 0 for one in damages for x in one.layers) else "linear")
        axes.set_title(title, loc="left", fontsize=11, color=TEXT)
        axes.set_xlabel("layer", color=TEXT)
        _plain(axes)
    attention.set_ylabel("squared, relative to the original", color=TEXT)
    if len(damages) > 1:
        attention.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def _bars(axes: Axes, damages: Sequence[Damage]) -> None:
    axes.set_title("Cross-entropy, nats a token", loc="left", fontsize=11, color=TEXT)
    names = ["original", *(one.method for one in damages)]
    values = [damages[0].cross_entropy_before, *(one.cross_entropy for one in damages)]
    colours = ["#999999", *(COLOURS[number % len(COLOURS)] for number in range(len(damages)))]
    drawn = axes.barh(names, values, color=colours, height=0.6)
    axes.bar_label(drawn, [f"{value:.2f}" for value in values], padding=4, color=TEXT)
    axes.set_xlim(0, 1.2 * max(values))
    axes.invert_yaxis()
    axes.tick_params(left=False)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=TEXT)
