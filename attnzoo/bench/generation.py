"""`attnzoo bench generation`: decoding of a whole model, ours beside transformers' own, and beside what the bytes say.

Every mechanism is a process of its own (`attnzoo.hf.generation.bench`) that times ours and then transformers'. They set
up and compile side by side, and time one after another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from attnzoo.bench import report

Row = dict[str, Any]
MECHANISMS = ("MHA", "GQA-8", "MQA", "MLA", "window 1k", "linear", "int8 GQA-8")
LARGE = {("MHA", 64), ("MLA", 64)}  # 69 GB of cache on one side or both: alone


def run(
    mechanisms: Sequence[str], batches: Iterable[int], out: Path, jobs: int, length: int, commit: str | None
) -> int:
    """Time these mechanisms at these batches; write JSON, table and plot into `out`, beside rows of others.

    Returns:
        1 if replayed steps gave other logits than plain ones, else 0.
    """
    from attnzoo.bench.running import limits, machine

    started = time.perf_counter()
    about = machine(commit)
    about["limits"] = limits()
    print("# " + json.dumps(about["limits"]), flush=True)
    import torch

    torch.cuda.empty_cache()
    small = [(name, [b for b in batches if (name, b) not in LARGE]) for name in mechanisms]
    rows: list[Row] = []
    with tempfile.NamedTemporaryFile() as lock, ThreadPoolExecutor(jobs) as pool:
        tasks = [(name, some) for name, some in small if some]
        for found in pool.map(lambda task: _measured(task[0], task[1], length, lock.name), tasks):
            rows += found
        for name, batch in sorted(LARGE):
            if name in mechanisms and batch in batches:
                rows += _measured(name, [batch], length, lock.name)
    path = out / f"generation_{report.slug(about['device'])}.json"
    rows = _with_predictions(rows, about["limits"]["copy_gbs"])
    about["seconds"] = round(time.perf_counter() - started)
    report.write(path, about | {"rows": merged(path, rows)})
    draw(out)
    wrong = [row for row in rows if row.get("error", 0) > 0.03]
    print(f"# {len(rows)} rows, {len(wrong)} wrong, {about['seconds']} s")
    return int(bool(wrong))


def _measured(mechanism: str, batches: list[int], length: int, lock: str) -> list[Row]:
    command = [sys.executable, "-W", "ignore", "-m", "attnzoo.hf.generation.bench", mechanism]
    command += ["--batches", *map(str, batches), "--length", str(length), "--lock", lock]
    few = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}  # each would start as many as there are cores
    rows: list[Row] = []
    other = ["no reason given"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=few) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                rows.append(json.loads(line))
                print(line, end="", flush=True)
            elif line.strip():
                other.append(line.strip()[:200])
    if process.returncode:
        print(f"# {mechanism} ended early: {other[-1]}", flush=True)
        done = {row["batch"] for row in rows if row["side"] == "ours"}
        row = {"side": "ours", "mechanism": mechanism, "length": length, "unavailable": other[-1]}
        rows += [row | {"batch": batch} for batch in batches if batch not in done]
    return rows


def _with_predictions(rows: list[Row], copy_gbs: float) -> list[Row]:
    for row in rows:
        if "bytes" in row:
            row["predicted_ms"] = row["bytes"] / copy_gbs / 1e6
        for name in ("ms", "generate_ms", "predicted_ms"):
            if name in row:
                row[name.removesuffix("ms") + "tokens_s"] = row["batch"] / row[name] * 1e3
    return rows


def merged(path: Path, rows: list[Row]) -> list[Row]:
    """These rows, and those of other mechanisms and batches that the file holds already."""
    new = {(row["mechanism"], row["batch"]) for row in rows}
    old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    every = [row for row in old if (row["mechanism"], row["batch"]) not in new] + rows
    return sorted(every, key=lambda row: (MECHANISMS.index(row["mechanism"]), row["batch"], row["side"]))


def draw(folder: Path) -> None:
    """Write `generation_<device>.md` and `.png` from each `generation_*.json` in `folder`."""
    for path in sorted(folder.glob("generation_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        path.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
        plot(path.with_suffix(".png"), result)


def markdown(result: Mapping[str, Any]) -> str:
    """The table: tokens/s of both sides, and what the bytes predict."""
    text = [
        f"{result['device']}, bf16, torch {result['torch']}, triton {result['packages']['triton']}; commit "
        f"{str(result['commit'])[:12]}. Copy in the same run: {result['limits']['copy_gbs']} GB/s.",
        "",
        "| mechanism | batch | GB a step | bytes predict, tokens/s | `attnzoo.hf.generate` | of predicted "
        "| `generate` in `graphed` | transformers' best | with | ours / theirs |",
        "|---" * 10 + "|",
    ]
    for (mechanism, batch), pair in _pairs(result["rows"]).items():
        ours, peer = pair.get("ours", {}), pair.get("transformers", {})
        if "ms" not in ours:
            text.append(f"| {mechanism} | {batch} | {ours.get('unavailable', 'not run')} |" + " |" * 7)
            continue
        theirs = peer.get("generate_tokens_s")
        text.append(
            f"| {mechanism} | {batch} | {ours['bytes'] / 1e9:.2f} | {ours['predicted_tokens_s']:,.0f} "
            f"| {ours['tokens_s']:,.0f} | {ours['predicted_ms'] / ours['ms']:.2f} | {ours['generate_tokens_s']:,.0f} "
            + (
                f"| {theirs:,.0f} | {peer['how']} | {ours['generate_tokens_s'] / theirs:.2f} |"
                if theirs
                else "| – " * 3 + "|"
            )
        )
    return "\n".join([*text, ""])


def plot(path: Path, result: Mapping[str, Any]) -> None:
    """Bars of tokens/s for each mechanism, a panel for each batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    pairs = _pairs(result["rows"])
    batches = sorted({batch for _, batch in pairs})
    figure = Figure(figsize=(5.2 * len(batches), 4), layout="constrained")
    bars = (("ours", "tokens_s", "attnzoo.hf.generate"), ("ours", "generate_tokens_s", "generate in graphed"),
            ("transformers", "generate_tokens_s", "transformers' best"))  # fmt: skip
    for panel, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        names = [name for name in MECHANISMS if (name, batch) in pairs]
        for number, (side, key, label) in enumerate(bars):
            heights = [pairs[name, batch].get(side, {}).get(key, 0) for name in names]
            panel.bar([x + 0.27 * number for x in range(len(names))], heights, 0.27, label=label)
        for x, name in enumerate(names):
            if (most := pairs[name, batch].get("ours", {}).get("predicted_tokens_s")) is not None:
                panel.hlines(most, x - 0.15, x + 0.7, color="#333333", linewidth=1.2)
        panel.set_xticks([x + 0.27 for x in range(len(names))], names, rotation=25, ha="right", fontsize=8)
        panel.set_title(f"batch {batch}", fontsize=10)
        panel.set_ylabel("tokens/s (lines: what the bytes predict)")
    figure.axes[-1].legend(fontsize=7)
    figure.suptitle(f"{result['device']}, bf16, a decoder of 1B parameters, 8k tokens in the cache", fontsize=11)
    figure.savefig(path, dpi=110)


def _pairs(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], dict[str, Mapping[str, Any]]]:
    """Both sides of each mechanism and batch; of the ways that transformers has, the fastest."""
    found: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row.get("generate_tokens_s", 0)):
        found.setdefault((row["mechanism"], row["batch"]), {})[row["side"]] = row
    return dict(sorted(found.items(), key=lambda item: (MECHANISMS.index(item[0][0]), item[0][1])))
