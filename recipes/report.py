"""Side by side: a table on the terminal, and report.md, report.json and a picture in the run folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from recipes.evaluate import Evaluation
from recipes.report_details import markdown_details, print_details
from recipes.report_plot import plot
from recipes.run_folder import write_whole

PICTURE = "report.png"


def print_table(evaluations: Sequence[Evaluation]) -> None:
    """Prints the evaluations as a table, a model a row."""
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)  # fits into 80 columns
    for number, heading in enumerate(_headings(evaluations)):
        table.add_column(heading, justify="right" if number else "left", overflow="fold", vertical="bottom")
    for row in _cells(evaluations):
        table.add_row(*row)
    Console().print(table)


def write_report(
    folder: Path | str,
    *,
    evaluations: Sequence[Evaluation],
    curve: Sequence[Mapping[str, float]],
    meta: Mapping[str, Any],
) -> None:
    """Writes report.md, report.json and report.png into `folder` and prints the table.

    Args:
        folder: of the run; made when missing.
        evaluations: of the models, in the order of the rows; the last one is what came out.
        curve: measurements while training, each with step, tokens and cross_entropy (held out, in nats); may be empty.
        meta: what was run, shown as a list.

    Raises:
        ValueError: when there is no evaluation.
    """
    if not evaluations:
        raise ValueError("evaluations is empty; a report needs at least one")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [dataclasses.asdict(evaluation) for evaluation in evaluations]
    record = {"meta": dict(meta), "evaluations": rows, "curve": [dict(point) for point in curve]}
    write_whole(folder / "report.json", json.dumps(record, indent=2, default=str))
    plot(folder / PICTURE, evaluations, curve)
    write_whole(folder / "report.md", _markdown(evaluations, meta))
    print_table(evaluations)
    print_details(evaluations)


def _markdown(evaluations: Sequence[Evaluation], meta: Mapping[str, Any]) -> str:
    headings = [heading.replace("-\n", "-").replace("\n", " ") for heading in _headings(evaluations)]
    lines = ["# Report", "", "| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in _cells(evaluations)]
    lines += ["", f"Measured on {evaluations[-1].tokens:,} held-out tokens that a model predicts.", ""]
    lines += [f"![Perplexity, cache and speed]({PICTURE})", ""]
    lines += markdown_details(evaluations)
    facts = [f"- {key}: {_fact(value)}" for key, value in meta.items()]
    lines += ["## What was run", "", *facts, ""] if facts else []
    return "\n".join(lines)


def _headings(evaluations: Sequence[Evaluation]) -> list[str]:
    headings = ["model", "perplexity", "cross-\nentropy", "accuracy", "parameters", "KV bytes\nper token"]
    return headings + (["prefill\ntokens/s", "decode\ntokens/s"] if _has_speed(evaluations) else [])


def _cells(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    rows = []
    for one in evaluations:
        row = [one.name, _number(one.perplexity), f"{one.cross_entropy:.3f}", f"{one.accuracy:.1%}"]
        row += [f"{one.parameters / 1e6:,.1f}M", f"{one.kv_bytes_per_token:,.0f}"]
        if _has_speed(evaluations):
            row += [_number(one.prefill_tokens_per_s), _number(one.decode_tokens_per_s)]
        rows.append(row)
    return rows


def _has_speed(evaluations: Sequence[Evaluation]) -> bool:
    return any(one.decode_tokens_per_s is not None for one in evaluations)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if value >= 1e7:
        return f"{value:.2e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def _fact(value: Any) -> str:
    return f"`{json.dumps(value, default=str)}`" if isinstance(value, dict | list) else str(value)
