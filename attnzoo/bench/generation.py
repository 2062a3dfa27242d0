"""`attnzoo bench generation`: decoding of a whole model, ours beside transformers' own, and beside what the bytes say.

Every mechanism and batch is a process of its own (`attnzoo.hf.generation.bench`): it times ours and then transformers'.
They set up and compile side by side, and time one after another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from attnzoo.bench import report

Row = dict[str, Any]
# Bytes of keys and values a token takes, on the side where it takes more; with transformers also one layer's, repeated.
MECHANISMS = {
    "MHA": 131072,
    "GQA-8": 32768 + 8192,
    "MQA": 4096 + 8192,
    "MLA": 131072,
    "window 1k": 4096 + 1024,
    "linear": 512,
    "int8 GQA-8": 17408,
}


def run(cases: Iterable[tuple[str, int]], out: Path, jobs: int, length: int, commit: str | None) -> int:
    """Time these mechanisms, each at a batch; write JSON, table and plot into `out`, beside rows of others.

    The JSON file has each row as soon as it is measured.

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
    path = out / f"generation_{report.slug(about['device'])}.json"
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows: list[Row] = []
    writing = threading.Lock()

    def keep(row: Row) -> None:
        with writing:
            print(json.dumps(row), flush=True)
            row["commit"] = str(about["commit"])[:12]
            rows.append(with_predictions(row, about["limits"]["copy_gbs"]))
            about["seconds"] = round(time.perf_counter() - started)
            report.write(path, about | {"rows": merged(before, rows)})

    room = Room(0.95 * torch.cuda.mem_get_info()[0] / 1e9)
    with tempfile.NamedTemporaryFile() as lock, ThreadPoolExecutor(jobs) as pool:
        waiting = [
            pool.submit(_measure, name, batch, length, lock.name, room.of(needs(name, batch, length)), keep)
            for name, batch in cases
        ]
        for done in waiting:
            done.result()
    draw(out)
    wrong = [row for row in rows if row.get("error", 0) > 0.03]
    print(f"# {len(rows)} rows, {len(wrong)} wrong, {about['seconds']} s")
    return int(bool(wrong))


def needs(mechanism: str, batch: int, length: int) -> float:
    """GB of GPU memory that a process takes at most: what it runs on, weights, and the cache."""
    return 4 + MECHANISMS[mechanism] * batch * length / 1e9


class Room:
    """GPU memory, given out so that processes fit side by side: of those that wait and fit, to the largest first."""

    def __init__(self, size: float) -> None:
        self.free, self.size, self.changed = size, size, threading.Condition()
        self.waiting: list[float] = []

    @contextmanager
    def of(self, size: float) -> Iterator[None]:
        """So much of it, once it is there."""
        size = min(size, self.size)
        with self.changed:
            self.waiting.append(size)
            self.changed.wait_for(lambda: size == max((s for s in self.waiting if s <= self.free), default=0))
            self.waiting.remove(size)
            self.free -= size
            self.changed.notify_all()
        try:
            yield
        finally:
            with self.changed:
                self.free += size
                self.changed.notify_all()


def _measure(
    mechanism: str,
    batch: int,
    length: int,
    lock: str,
    memory: AbstractContextManager[None],
    keep: Callable[[Row], None],
) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "attnzoo.hf.generation.bench", mechanism]
    command += ["--batch", str(batch), "--length", str(length), "--lock", lock]
    # Each would compile with as many processes as there are cores, every one of which takes seconds to start.
    alone = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    other, ours = "no reason given", False
    with (
        memory,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=alone) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                keep(row := json.loads(line))
                ours = ours or row["side"] == "ours"
            elif line.strip():
                other = line.strip()[:200]
    if process.returncode:
        print(f"# {mechanism}, {batch} rows: ended early ({process.returncode}): {other}", flush=True)
        if not ours:
            keep({"side": "ours", "mechanism": mechanism, "length": length, "batch": batch, "unavailable": other})


def with_predictions(row: Row, copy_gbs: float) -> Row:
    """The row with the time that its bytes take, and tokens a second of all its times."""
    if "bytes" in row:
        row["predicted_ms"] = row["bytes"] / copy_gbs / 1e6
    for name in ("ms", "generate_ms", "predicted_ms"):
        if name in row:
            row[name.removesuffix("ms") + "tokens_s"] = row["batch"] / row[name] * 1e3
    return row


def merged(before: Iterable[Row], rows: Iterable[Row]) -> list[Row]:
    """These rows, and earlier ones of other mechanisms and batches."""
    new = {(row["mechanism"], row["batch"]) for row in rows}
    every = [row for row in before if (row["mechanism"], row["batch"]) not in new] + list(rows)
    return sorted(every, key=lambda row: (_PLACES[row["mechanism"]], row["batch"], row["side"]))


def draw(folder: Path) -> None:
    """Write `generation_<device>.md` and `.png` from each `generation_*.json` in `folder`."""
    for path in sorted(folder.glob("generation_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        path.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
        plot(path.with_suffix(".png"), result)


def markdown(result: Mapping[str, Any]) -> str:
    """The table: tokens/s of both sides, and what the bytes predict."""
    commits = dict.fromkeys(str(row.get("commit", result["commit"]))[:12] for row in result["rows"])
    text = [
        f"{result['device']}, bf16, torch {result['torch']}, triton {result['packages']['triton']}; commits of the "
        f"rows: {', '.join(commits)}. Copy in the same run: {result['limits']['copy_gbs']} GB/s.",
        "",
        "| mechanism | batch | GB a step | bytes predict, tokens/s | `attnzoo.hf.generate` | of predicted "
        "| `generate` in `graphed` | transformers' best | with | ours / theirs | `graphed` / theirs |",
        "|---" * 11 + "|",
    ]
    for (mechanism, batch), pair in _pairs(result["rows"]).items():
        ours, peer = pair.get("ours", {}), pair.get("transformers", {})
        if "ms" not in ours:
            text.append(f"| {mechanism} | {batch} | {ours.get('unavailable', 'not run')} |" + " |" * 8)
            continue
        theirs = peer.get("generate_tokens_s")
        text.append(
            f"| {mechanism} | {batch} | {ours['bytes'] / 1e9:.2f} | {ours['predicted_tokens_s']:,.0f} "
            f"| {ours['tokens_s']:,.0f} | {ours['predicted_ms'] / ours['ms']:.2f} | {ours['generate_tokens_s']:,.0f} "
            + (
                f"| {theirs:,.0f} | {peer['how']} | {ours['tokens_s'] / theirs:.2f} "
                f"| {ours['generate_tokens_s'] / theirs:.2f} |"
                if theirs
                else "| – " * 4 + "|"
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
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"{result['device']}, bf16, a decoder of 1B parameters, 8k tokens in the cache", fontsize=11)
    figure.savefig(path, dpi=110)


def _pairs(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], dict[str, Mapping[str, Any]]]:
    """Both sides of each mechanism and batch; of the ways that transformers has, the fastest."""
    found: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row.get("generate_tokens_s", 0)):
        found.setdefault((row["mechanism"], row["batch"]), {})[row["side"]] = row
    return dict(sorted(found.items(), key=lambda item: (_PLACES[item[0][0]], item[0][1])))


_PLACES = {name: place for place, name in enumerate(MECHANISMS)}
