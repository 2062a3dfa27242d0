"""What each method of conversion costs SmolLM2-135M-Instruct, from 3 KV heads to 1 in all layers, without training.

    python scripts/conversion_damage.py docs/benchmarks/conversion_smollm2.json [mean svd refit regress ...]

Calibrates on the King James Bible and on Python's standard library, and judges on Shakespeare's plays, of which the
calibration saw nothing. Results are added to the file one by one, with the machine and versions they came from.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from transformers import AutoModelForCausalLM

import attnzoo
from attnzoo import GQA
from attnzoo.conversion.damage import Damage
from attnzoo.hf.calibration_text import token_rows
from recipes.samples import ensure_sample

SAMPLES, LENGTH = int(os.environ.get("SAMPLES", 24)), 512  # of calibration text
JUDGED = int(os.environ.get("JUDGED", 8))  # pieces of held-out text, of the same length
STEPS = int(os.environ.get("STEPS", 100))
MEAN_GAP = {"svd": 0.70, "best": 0.85}  # how much of the mean's damage has to be gone


def main() -> None:
    path, methods = Path(sys.argv[1]), sys.argv[2:] or ["mean", "svd", "aligned", "refit", "regress"]
    source = ensure_sample("smollm2")
    bible, plays = (_files(ensure_sample(name), "*.txt") for name in ("bible", "shakespeare"))
    python = _files(Path(sysconfig.get_paths()["stdlib"]), "*.py")
    calibration = torch.cat([token_rows(text, source, SAMPLES // 2, LENGTH, name="text") for text in (bible, python)])
    held_out = token_rows(plays, source, JUDGED, LENGTH, name="plays")
    record = json.loads(path.read_text()) if path.is_file() else {"conversions": []}
    record |= {"machine": _machine(), "text": _text(), "bars": MEAN_GAP}
    with TemporaryDirectory() as folder:
        whole = _as_fp32(source, Path(folder) / "fp32")
        for method in methods:
            found: list[Damage] = []
            attnzoo.convert(
                whole,
                GQA(num_kv_heads=1),
                method=method,
                calibration=None if method == "mean" else calibration,
                held_out=held_out,
                steps=STEPS,
                out=Path(folder) / method,
                report=found.append,
            )
            steps = STEPS if method == "regress" else None
            kept = [one for one in record["conversions"] if one["method"] != method]
            record["conversions"] = [*kept, found[0].to_dict() | {"steps": steps, "calibration_pieces": SAMPLES}]
            path.write_text(json.dumps(record, indent=2) + "\n")
            _print(record["conversions"])


def _files(folder: Path, pattern: str) -> list[str]:
    """All files as one text, of which pieces are then taken that are spread evenly over it."""
    return ["\n".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob(pattern)))]


def _as_fp32(source: Path, out: Path) -> Path:
    """The bf16 sample in fp32, so that rounding is no part of the damage."""
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(out)
    for path in source.glob("tokenizer*"):
        (out / path.name).write_bytes(path.read_bytes())
    return out


def _machine() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def _text() -> dict[str, object]:
    return {
        "calibration": "King James Bible and Python's standard library, half each",
        "calibration_pieces": SAMPLES,
        "held_out": "Shakespeare's plays",
        "held_out_pieces": JUDGED,
        "tokens_a_piece": LENGTH,
    }


def _print(conversions: list[dict]) -> None:
    mean = next((one["cross_entropy"] for one in conversions if one["method"] == "mean"), float("nan"))
    for one in conversions:
        before, after = one["cross_entropy_before"], one["cross_entropy"]
        gone = (mean - after) / (mean - before)
        print(
            f"{one['method']:>8}: cross-entropy {before:.3f} -> {after:.3f}, perplexity {one['perplexity']:,.1f}, "
            f"KL {one['kl']:.3f}, {gone:.1%} of the mean's damage gone, {one['seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
