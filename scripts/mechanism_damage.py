"""What windows and linear attention cost a real model untrained, beside mean-pooled KV heads of as many bytes.

    python scripts/mechanism_damage.py [--only NAME ...] [--calibration FILE_OR_FOLDER ...] [--write [FILE]]

SmolLM2-135M-Instruct. Layers are chosen by the damage of each alone on calibration text, from Python's standard library
and what is named; the result is evaluated on Shakespeare's plays: text of another source than any that the conversion
saw. `--write` puts the numbers into docs/benchmarks/mechanism_smollm2.json, into what is there already, and takes the
layers' damage from there where it was measured before.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from mla_damage import measured, predicted, read, rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import attnzoo
from attnzoo import GQA, Linear
from attnzoo.hf.hybrid_convert import convert_hybrid_model
from attnzoo.masks import Causal, GlobalTokens, SlidingWindow
from attnzoo.specs import Spec
from recipes.samples import ensure_sample

OUT = Path(__file__).parents[1] / "docs" / "benchmarks" / "mechanism_smollm2.json"
LAYERS = 30
HYBRID = Linear(feature_map="hedgehog", window=64)
SINKS = GQA(mask=SlidingWindow(508) | GlobalTokens(4) & Causal())
# Name -> what changed layers become, and how many are.
CASES: dict[str, tuple[Spec | None, int]] = {
    "original": (None, 0),
    "window 512, 15 layers": (GQA(mask=SlidingWindow(512)), 15),
    "window 512, 24 layers": (GQA(mask=SlidingWindow(512)), 24),
    "window 512, all layers": (GQA(mask=SlidingWindow(512)), LAYERS),
    "window 508 and 4 first tokens, 15 layers": (SINKS, 15),
    "window 508 and 4 first tokens, 24 layers": (SINKS, 24),
    "window 508 and 4 first tokens, all layers": (SINKS, LAYERS),
    "linear, window 64, 15 layers": (HYBRID, 15),
    "linear, window 64, 15 layers, maps not trained": (HYBRID, 15),
    "linear, window 64, all layers": (HYBRID, LAYERS),
    "GQA, mean, 17 layers with 1 head": (GQA(1), 17),
    "GQA, mean, 20 layers with 1 head": (GQA(1), 20),
    "GQA, mean, all layers with 1 head": (GQA(1), LAYERS),
}


def pooled(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """Mean-pooled to one KV head (arXiv 2305.13245), but for some layers, spread evenly, which keep their three."""
    kept = {i * LAYERS // (LAYERS - count) for i in range(LAYERS - count)}
    return attnzoo.swap(copy.deepcopy(model), [GQA(3 if number in kept else 1) for number in range(LAYERS)])


def share_of(spec: Spec | None, count: int, length: int) -> float:
    """Of the cache's bytes that are left at a length, in bf16."""
    whole = 2 * 3 * 64 * length * 2
    if spec is None:
        return 1.0
    if isinstance(spec, Linear):
        assert spec.window is not None
        one = 3 * (4 * 128 * 65 + 2 * (spec.window - 1) * (128 + 64 + 64))
    else:
        assert isinstance(spec, GQA)
        one = whole // 3 if spec.mask is None else 2 * 3 * 64 * min(length, 512) * 2
    return (count * one + (LAYERS - count) * whole) / (LAYERS * whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=None, help="parts of the names of the cases to run")
    parser.add_argument("--calibration", nargs="*", type=Path, default=[])
    parser.add_argument("--rows", type=int, default=1, help="of calibration text, from each source")
    parser.add_argument("--length", type=int, default=1024, help="of a row of calibration text")
    parser.add_argument("--evaluated", type=int, default=2, help="rows of held-out text")
    parser.add_argument("--evaluated-length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--ranked", type=int, default=2048, help="tokens on which each layer alone is measured")
    parser.add_argument("--write", type=Path, nargs="?", const=OUT)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "save_pretrained")

    folder = ensure_sample("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sources = {"Python's standard library": read([Path(os.__file__).parent], "*.py")}
    sources |= {path.name: read([path]) for path in options.calibration}
    calibration = torch.cat([rows_of(text, tokenizer, options.rows, options.length) for text in sources.values()])
    plays = read([ensure_sample("shakespeare")], "*.txt")
    held_out = rows_of(plays, tokenizer, options.evaluated, options.evaluated_length)
    about = {
        "model": "SmolLM2-135M-Instruct, fp32, no training but that of feature maps",
        "calibration": f"{len(calibration)} x {options.length} tokens: {', '.join(sources)}",
        "held_out": f"{len(held_out)} x {options.evaluated_length} tokens of Shakespeare's plays",
        "kv_share": f"of the cache's bytes in bf16 after {options.evaluated_length} tokens",
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
    }
    known: dict[str, Any] = {"about": about, "alone": {}, "cases": {}}
    if options.write and options.write.exists():
        known = json.loads(options.write.read_text())
    truth = predicted(model, held_out)
    for name, (spec, count) in CASES.items():
        if options.only and not any(part in name for part in options.only):
            continue
        start = time.perf_counter()
        made, chosen = model, list(range(count))
        if isinstance(spec, GQA) and spec.mask is None:
            made, chosen = pooled(model, count), []
        elif spec is not None:
            kind = name.partition(",")[0] if isinstance(spec, GQA) else "linear"
            made, chosen = hybrid(
                model, spec, count, kind, name, calibration, known["alone"], options.steps, options.ranked
            )
        row = {"kv_share": round(share_of(spec, count, options.evaluated_length), 3)}
        row |= {**measured(made, held_out, truth), "changed": chosen, "seconds": round(time.perf_counter() - start, 1)}
        print(f"{name:50} {row['kv_share']:.3f}  CE {row['cross_entropy']:.4f}  KL {row['kl']:.4f}", flush=True)
        known["cases"][name] = row | ({} if known["about"] == about else {"about": about})
        if options.write:
            options.write.write_text(json.dumps(known, indent=2) + "\n")


def hybrid(
    model: PreTrainedModel,
    spec: Spec,
    count: int,
    kind: str,
    name: str,
    calibration: torch.Tensor,
    alone: dict[str, list[float]],
    steps: int,
    ranked: int,
) -> tuple[PreTrainedModel, list[int]]:
    """The model with so many layers changed, and which; measures the layers' damage where it is not known yet."""
    trained = calibration if isinstance(spec, Linear) and "not trained" not in name else None  # a mask needs no text
    if count == LAYERS:
        return convert_hybrid_model(model, spec, list(range(LAYERS)), trained, steps=steps)[0], list(range(LAYERS))
    if kind not in alone:
        new, damage = convert_hybrid_model(model, spec, count, calibration, steps=steps, ranked=ranked)
        assert damage is not None
        alone[kind] = damage.alone
        return new, damage.changed
    layers = sorted(sorted(range(LAYERS), key=lambda number: alone[kind][number])[:count])
    return convert_hybrid_model(model, spec, layers, trained, steps=steps)[0], layers


if __name__ == "__main__":
    main()
