"""What conversions cost, side by side: a table on the terminal, and damage.json and damage.png in a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from attnzoo.conversion.damage import Damage
from recipes.damage_plot import plot
from recipes.run_folder import write_whole

HEADINGS = ("method", "perplexity", "cross-\nentropy", "lost", "KL", "worst\nlayer", "KV bytes\nper token", "seconds")


def print_damages(damages: Sequence[Damage]) -> None:
    """Prints a conversion a row, below the original."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)  # fits into 80 columns
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if number else "left", vertical="bottom")
    one = damages[0]
    table.add_row(
        "original",
        _short(one.perplexity_before),
        f"{one.cross_entropy_before:.3f}",
        *"–––",
        f"{one.kv_bytes_before:,}",
        "–",
    )
    for one in damages:
        worst = max(one.layers, key=lambda layer: layer.attention_error)
        table.add_row(
            one.method,
            _short(one.perplexity),
            f"{one.cross_entropy:.3f}",
            f"{one.cross_entropy - one.cross_entropy_before:+.3f}",
            f"{one.kl:.3f}",
            f"{worst.layer}: {worst.attention_error:.2g}",
            f"{one.kv_bytes:,}",
            f"{one.seconds:,.0f}",
        )
    console = Console()
    console.print(table)
    kind = "held-out" if one.held_out else "calibration"
    console.print(f"on {one.tokens:,} tokens of {kind} text; worst layer: its attention's squared error", style="dim")


def write_damages(folder: Path, damages: Sequence[Damage]) -> None:
    """Writes damage.json, all numbers of each conversion, and damage.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "damage.json", json.dumps([one.to_dict() for one in damages], indent=2))
    plot(folder / "damage.png", damages)


def _short(value: float) -> str:
    return f"{value:.2e}" if value >= 1e7 else f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"
