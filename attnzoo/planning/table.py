"""A plan for people: a table for the terminal, and the same in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

from attnzoo.planning.making import Plan, Row

_HEADINGS = (
    ("", "mechanism"),
    ("", "params"),
    ("train", "FLOP/tok"),
    ("HBM", "standard"),
    ("HBM", "tiled"),
    ("KV B", "/token"),
    ("KV B", "/seq"),
    ("max", "batch"),
    ("max", "context"),
    ("decode", "ms/step"),
    ("decode", "tok/s"),
)
_WIDTH, _NAME = 100, 22  # characters of a line and of a name, at most, on the terminal


def text_table(plan: Plan) -> str:
    """The plan in at most 100 columns, with what was asked above and what to know below."""
    rows = [_cells(row, plan) for row in plan.rows]
    named = [(name if len(name) <= _NAME else name[: _NAME - 1] + "…", *cells) for name, *cells in rows]
    widths = [max(map(len, column)) for column in zip(*named, *_lines(_HEADINGS), strict=True)]
    lines = [*_lines(_HEADINGS), tuple("-" * width for width in widths), *named]
    aligned = "\n".join(_aligned(line, widths) for line in lines)
    return "\n".join([*map(_wrapped, _facts(plan)), "", aligned, "", *map(_wrapped, _notes(plan))])


def markdown_table(plan: Plan) -> str:
    """The plan as a Markdown page."""
    headings = [" ".join(filter(None, pair)).replace(" /", "/") for pair in _HEADINGS]
    lines = ["# Plan", "", *(f"- {fact}" for fact in _facts(plan)), ""]
    lines += [_bars(headings), "|---" + "|---:" * (len(headings) - 1) + "|"]
    lines += [_bars(_cells(row, plan)) for row in plan.rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in _notes(plan)), ""])


def _cells(row: Row, plan: Plan) -> tuple[str, ...]:
    cost = row.cost
    if cost is None:
        return (row.name, *("–" for _ in _HEADINGS[1:]))
    star = "" if cost.gpus <= plan.gpu.count else " *"
    return (
        row.name + star,
        _parameters(cost.parameters),
        short(cost.training_flops_per_token),
        short(cost.hbm_standard_bytes),
        short(cost.hbm_tiled_bytes),
        f"{cost.kv_bytes_per_token:,}",
        short(cost.kv_bytes),
        short(cost.max_batch),
        "any" if cost.max_context is None else short(cost.max_context),
        f"{cost.decode_seconds * 1e3:.3g}" if cost.decode_seconds < 1 else f"{cost.decode_seconds * 1e3:,.0f}",
        short(cost.tokens_per_s),
    )


def short(number: float, letters: str = "kMGTPE") -> str:
    """Three digits and a letter for the thousands: 7.24G; whole numbers below 10,000 as they are."""
    if number < 10_000:
        return f"{number:.0f}" if number >= 100 or number == int(number) else f"{number:.3g}"
    power = 1
    while number / 1000**power >= 999.5 and power < len(letters):
        power += 1
    number /= 1000**power
    digits = 2 - (number >= 9.995) - (number >= 99.95)
    return f"{number:.{digits}f}{letters[power - 1]}"


def _parameters(number: int) -> str:
    return short(number, "kMBT")


def _facts(plan: Plan) -> list[str]:
    model, gpu, own = plan.model, plan.gpu, plan.rows[0].cost
    assert own is not None
    active = "" if own.active_parameters == own.parameters else f" ({_parameters(own.active_parameters)} active)"
    made = "" if model.max_positions is None else f", made for {model.max_positions:,} positions"
    return [
        f"{model.model_type}: {_parameters(own.parameters)} parameters{active}, {len(model.layers)} layers of "
        f"{model.dim}, vocabulary {model.vocab_size:,}{made}",
        f"context {plan.context:,}, batch {plan.batch:,}, {plan.dtype}; {gpu.count} GPU: {gpu.memory_gb:g} GB "
        f"({gpu.reserve:.0%} kept), {gpu.bandwidth_gbs:g} GB/s, {gpu.tflops:g} TFLOP/s, {gpu.sram_kb:g} KiB SRAM",
    ]


def _notes(plan: Plan) -> list[str]:
    notes = ["HBM: bytes of attention, one forward pass over one sequence. KV B/token: what one token more takes."]
    lacking = [row for row in plan.rows if row.cost is not None and row.cost.gpus > plan.gpu.count]
    if lacking:
        room = f"{short(plan.gpu.usable_bytes / 1e9)} GB"
        needs = ", ".join(f"{row.name} {row.cost.gpus}" for row in lacking if row.cost is not None)
        notes += [
            f"* Weights and batch do not fit into {room}; decode is as if they did. GPUs that hold them: {needs}."
        ]
    refused = [f"{row.name}: {row.refusal}." for row in plan.rows if row.refusal]
    return [*notes, *refused, *(f"Note: {note}." for note in plan.model.notes)]


def _lines(headings: Sequence[tuple[str, str]]) -> list[tuple[str, ...]]:
    return [tuple(line) for line in zip(*headings, strict=True)]


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    return " ".join([cells[0].ljust(len(name)), *numbers]).rstrip()


def _wrapped(text: str) -> str:
    return fill(text, _WIDTH, subsequent_indent="  ")


def _bars(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
