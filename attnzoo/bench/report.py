"""Tables and plots of measured attention, made from the JSON files and from nothing else."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]
TITLES = {
    "dense": "Causal, 16k tokens",
    "window": "Sliding window, D128, 32/8 heads",
    "sparse": "Patterns, D128, 32/8 heads, S 16k",
    "features": "Options, causal, D128, 32/8 heads, 16k tokens",
    "table": "Further classes of calls that the dispatch ranks",
}


def write(path: Path, result: Mapping[str, Any]) -> None:
    """One suite's result as JSON; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in result["rows"]]
    whole = path.with_suffix(".new")
    whole.write_text(json.dumps({**result, "rows": rounded}, indent=1) + "\n", encoding="utf-8")
    whole.replace(path)


def slug(device: str) -> str:
    """`NVIDIA H200` becomes `h200`."""
    return device.removeprefix("NVIDIA ").split()[0].lower().replace("-", "_")


def line(row: Mapping[str, Any]) -> str:
    """One row as it is printed while the benchmark runs."""
    head = f"{row['suite']:8s} {row['case']:36s} {row['contestant']:18s}"
    if "unavailable" in row:
        return f"{head} -- {row['unavailable'][:80]}"
    if "forward_ms" not in row:
        return f"{head} WRONG: {row['error_ratio']} times the allowed error, {row['error_at']}"
    cells = [f"fwd {row['forward_ms']:8.3f} ms {row['forward_tflops']:6.1f} TF/s"]
    if "backward_ms" in row:
        cells.append(f"bwd {row['backward_ms']:8.3f} ms {row['backward_tflops']:6.1f} TF/s")
        cells.append(f"memory {row['forward_memory']:.2f} {row['training_memory']:.2f}")
    cells.append(f"error {row.get('error_ratio', 0):.2f}, first call {row['first_call_s']:.1f} s")
    return f"{head} {'  '.join(cells)}"


def draw(folder: Path) -> None:
    """Write `attention_<device>.md` and `attention_<device>.png` from the JSON files `attention_*.json` in `folder`."""
    results: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for suite in TITLES:
        for path in sorted(folder.glob(f"attention_{suite}_*.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            results[slug(result["device"])][suite] = result
    for name, suites in results.items():
        text = "\n".join(markdown(suite, result) for suite, result in suites.items())
        (folder / f"attention_{name}.md").write_text(text, encoding="utf-8")
        plot(folder / f"attention_{name}.png", suites)


def markdown(suite: str, result: Mapping[str, Any]) -> str:
    """A suite's table: TFLOP/s forward / backward of each contestant, and what the bars ask about."""
    rows = result["rows"]
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    limits, packages = result["limits"], {k: v for k, v in result["packages"].items() if v}
    text = [
        f"## {TITLES[suite]}",
        "",
        f"{result['device']}, bf16, torch {result['torch']}, cuDNN {result['cudnn']}, "
        + ", ".join(f"{name} {v}" for name, v in packages.items())
        + f"; commit {str(result['commit'])[:12]}. Limits in the same run: product {limits['matmul_tflops']} TFLOP/s, "
        f"copy {limits['copy_gbs']} GB/s. TFLOP/s forward / backward, medians.",
        "",
        "| case | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    by_case = _by_case(rows)
    for case, found in by_case.items():
        text.append(f"| {case} | " + " | ".join(_cell(found.get(name)) for name in names) + " |")
    text += ["", *_ratios(suite, by_case), ""]
    return "\n".join(text)


def _by_case(rows: Rows) -> dict[str, dict[str, Mapping[str, Any]]]:
    found: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        found[row["case"]][row["contestant"]] = row
    return found


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None or "forward_ms" not in row:
        return "wrong" if row and "error_ratio" in row else "–"
    backward = f"{row['backward_tflops']:.0f}" if "backward_ms" in row else "–"
    return f"{row['forward_tflops']:.0f} / {backward}"


def _ratios(suite: str, by_case: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Our kernel and our choice against the peers, as ratios of speed; above 1 is faster than the peer."""
    text = _against_plain(by_case) if suite == "features" else []
    text += [
        "| speed of | triton / FA2 | triton / Flex | triton / fastest | choice / fastest peer | choice / SDPA's own |",
        "|---|---|---|---|---|---|",
    ]
    for case, found in by_case.items():
        peers = [name for name in found if name.startswith("peer:")]
        any_other = [name for name in found if name not in ("via:auto", "via:triton")]
        flash = ["peer:sdpa-flash", "via:sdpa-flash"]
        columns = [("via:triton", flash), ("via:triton", ["peer:flex"]), ("via:triton", any_other)]
        columns += [("via:auto", peers), ("via:auto", ["peer:sdpa"])]
        cells = [
            " / ".join(_ratio(found, ours, others, d) for d in ("forward", "backward")) for ours, others in columns
        ]
        text.append(f"| {case} | " + " | ".join(cells) + " |")
    if suite == "sparse":
        text += ["", "Peak memory over inputs, outputs, logsumexp (and gradients), forward / training:", ""]
        for case, found in by_case.items():
            cells = [
                f"{name.partition(':')[2]} {row['forward_memory']:.2f} / {row['training_memory']:.2f}"
                for name, row in found.items()
                if "training_memory" in row
            ]
            text.append(f"- {case}: " + ", ".join(cells))
    return text


def _ratio(found: Mapping[str, Mapping[str, Any]], ours: str, others: Sequence[str], direction: str) -> str:
    key = f"{direction}_ms"
    times = [found[name][key] for name in others if key in found.get(name, {})]
    if not times or key not in found.get(ours, {}):
        return "–"
    return f"{min(times) / found[ours][key]:.2f}"


def _against_plain(by_case: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    text = ["Time over that of the same contestant's plain call, forward / backward:", ""]
    for case, found in by_case.items():
        cells = []
        for name, row in found.items():
            plain = by_case["plain"].get(name, {})
            both = [
                f"{row[key] / plain[key]:.2f}" if key in row and key in plain else "–"
                for key in ("forward_ms", "backward_ms")
            ]
            cells.append(f"{name} {' / '.join(both)}")
        text.append(f"- {case}: " + ", ".join(cells))
    return [*text, ""]


def plot(path: Path, suites: Mapping[str, Mapping[str, Any]]) -> None:
    """Bars of TFLOP/s, a panel for each suite and direction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    shown = [(suite, result) for suite, result in suites.items() if suite != "table"]
    if not shown:
        return
    figure = Figure(figsize=(15, 4.2 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 2, squeeze=False)
    for (suite, result), pair in zip(shown, panels, strict=True):
        by_case = _by_case(result["rows"])
        skipped = {f"via:{name}" for name in ("sdpa", "sdpa-flash", "sdpa-cudnn", "flash-attn-4", "fa3-fwd")}
        names = [n for n in dict.fromkeys(row["contestant"] for row in result["rows"]) if n not in skipped]
        for direction, panel in zip(("forward", "backward"), pair, strict=True):
            width = 0.85 / max(1, len(names))
            for number, name in enumerate(names):
                heights = [found.get(name, {}).get(f"{direction}_tflops", 0) for found in by_case.values()]
                at = [x + number * width for x in range(len(by_case))]
                panel.bar(at, heights, width, label=name.partition(":")[2])
            panel.axhline(result["limits"]["matmul_tflops"], color="#555555", linewidth=0.8, linestyle="--")
            panel.set_xticks([x + 0.4 for x in range(len(by_case))], list(by_case), rotation=20, ha="right", fontsize=7)
            panel.set_title(f"{TITLES[suite]}, {direction}", fontsize=10)
            panel.set_ylabel("TFLOP/s")
        pair[1].legend(fontsize=7, ncols=2)
    figure.suptitle(f"{shown[0][1]['device']}, bf16; dashed: an 8192³ matrix product in the same run")
    figure.savefig(path, dpi=110)
