"""Tables behind the first one of a report: by domain, by context, benchmarks; and what the models write."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from recipes.evaluate import Evaluation

Rows = list[list[str]]  # the first one is the heading


def details(evaluations: Sequence[Evaluation]) -> dict[str, Rows]:
    """Tables by title, a model a row; those that would say nothing are left out."""
    tables = {
        "Cross-entropy by domain": _table(
            evaluations, {one.name: _by_domain(one) for one in evaluations}, least_columns=2
        ),
        "Cross-entropy by tokens of context": _table(
            evaluations, {one.name: _by_context(one) for one in evaluations}, least_columns=2
        ),
        "lm-evaluation-harness": _table(evaluations, {one.name: _by_task(one) for one in evaluations}),
    }
    return {title: rows for title, rows in tables.items() if rows}


def print_details(evaluations: Sequence[Evaluation]) -> None:
    """Prints the tables, then what the models write."""
    console = Console()
    for title, rows in details(evaluations).items():
        table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, title=title, title_justify="left", title_style="")
        for number, heading in enumerate(rows[0]):
            table.add_column(heading, justify="right" if number else "left", overflow="fold", vertical="bottom")
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
    for prompt, by_model in samples(evaluations).items():
        console.print(f"After {prompt!r}:", markup=False)
        for name, text in by_model.items():
            console.print(f"  {name}: {text!r}", markup=False, highlight=False)


def markdown_details(evaluations: Sequence[Evaluation]) -> list[str]:
    """The same as lines of Markdown."""
    lines: list[str] = []
    for title, rows in details(evaluations).items():
        lines += [f"## {title}", "", "| " + " | ".join(rows[0]) + " |", "|---" + "|---:" * (len(rows[0]) - 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows[1:]] + [""]
    written = samples(evaluations)
    lines += ["## Samples", "", "Greedy, the most likely next tokens after each prompt.", ""] if written else []
    for prompt, by_model in written.items():
        lines += [f"After `{prompt!r}`:", ""]
        for name, text in by_model.items():
            lines += [f"**{name}**", "", *(f"> {line}".rstrip() for line in text.strip().splitlines() or [""]), ""]
    return lines


def samples(evaluations: Sequence[Evaluation]) -> dict[str, dict[str, str]]:
    """Continuations by prompt and model."""
    prompts = dict.fromkeys(prompt for one in evaluations for prompt in one.samples)
    return {
        prompt: {one.name: one.samples[prompt] for one in evaluations if prompt in one.samples} for prompt in prompts
    }


def _table(evaluations: Sequence[Evaluation], cells: dict[str, dict[str, str]], least_columns: int = 1) -> Rows:
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    if len(columns) < least_columns:
        return []
    return [["model", *columns], *([one.name, *(cells[one.name].get(c, "–") for c in columns)] for one in evaluations)]


def _by_domain(one: Evaluation) -> dict[str, str]:
    return {domain: f"{found['cross_entropy']:.3f}" for domain, found in one.domains.items()}


def _by_context(one: Evaluation) -> dict[str, str]:
    return {f"{row['first']:,}–{row['last']:,}": f"{row['cross_entropy']:.3f}" for row in one.context}


def _by_task(one: Evaluation) -> dict[str, str]:
    return {f"{task} {metric}": f"{value:.3f}" for task, found in one.tasks.items() for metric, value in found.items()}
