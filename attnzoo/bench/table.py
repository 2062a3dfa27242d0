"""From measured rows to the order in which `attention` asks its backends."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnzoo.ops.softmax.choice import LENGTHS, Class, merged


def write(path: Path, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Put this device's orders into the file at `path`; what was not measured now keeps its place."""
    tables = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    measured = {key: about[key] for key in ("capability", "torch", "cuda", "cudnn", "packages", "commit")}
    before = tables.get(about["device"], {}).get("orders", {})
    found = {text: list(merged(order, before.get(text, ()))) for text, order in orders(rows).items()}
    tables[about["device"]] = {"measured": measured, "orders": before | found}
    whole = path.with_suffix(".new")
    whole.write_text(json.dumps(tables, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    whole.replace(path)


def orders(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Backends by time for each class: forward alone, and forward with backward. Only right results count."""
    times: dict[Class, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        kind, _, backend = row["contestant"].partition(":")
        if kind != "via" or backend == "auto" or "forward_ms" not in row or row["case"] in _NOT_RANKED:
            continue
        for trains in (False, True):
            if trains and "backward_ms" not in row:
                continue
            total = row["forward_ms"] + (row["backward_ms"] if trains else 0)
            times[_class(row, trains)][row["case"]][backend] = total
    found = {}
    for a_class, by_case in times.items():
        # A backend that runs some of the cases only would win by the work that it left out.
        everywhere = set.intersection(*(set(backends) for backends in by_case.values()))
        totals = {name: sum(backends[name] for backends in by_case.values()) for name in everywhere}
        found[a_class.text] = sorted(totals, key=totals.__getitem__)
    return found


# Ranked with causal calls the first three would say nothing about these; the last repeats one of them for fewer peers.
_NOT_RANKED = ("alibi", "deterministic", "dropout", "plain")


def _class(row: Mapping[str, Any], trains: bool) -> Class:
    dim = 64 if row["dim"] <= 64 else 128 if row["dim"] <= 128 else 256
    length = next((n for n in LENGTHS[:-1] if row["length"] <= 2 * n), LENGTHS[-1])
    return Class(trains, row["kind"], dim, length, row["grouped"])
