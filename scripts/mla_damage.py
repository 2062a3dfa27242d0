"""What latent attention costs a real model without any training, beside mean-pooled KV heads of as many bytes.

    python scripts/mla_damage.py [--only NAME ...] [--calibration FILE_OR_FOLDER ...] [--steps 100] [--write]

SmolLM2-135M-Instruct; calibration text from Python's standard library and what is named, evaluated on Shakespeare's
plays: text of another source than any that the conversion saw. `--write` puts the numbers into
docs/benchmarks/mla_smollm2.json, into what is there already.
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
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch.nn.functional import kl_div, nll_loss
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import attnzoo
from attnzoo import GQA, MLA
from attnzoo.hf.latent_convert import convert_latent_model
from recipes.samples import ensure_sample

OUT = Path(__file__).parents[1] / "docs" / "benchmarks" / "mla_smollm2.json"
Case = Callable[[PreTrainedModel, torch.Tensor], PreTrainedModel]


def pooled(layers_kept: int) -> Case:
    """Mean-pooled to one KV head (arXiv 2305.13245), but for some layers, spread evenly, which keep theirs."""

    def make(model: PreTrainedModel, calibration: torch.Tensor) -> PreTrainedModel:
        layers = model.config.num_hidden_layers
        kept = {i * layers // layers_kept for i in range(layers_kept)} if layers_kept else set()
        return attnzoo.swap(copy.deepcopy(model), [GQA(3 if i in kept else 1) for i in range(layers)])

    return make


def latent(rank: int, rope: int, calibrated: bool = True, **fitting: object) -> Case:
    """Latent attention with a cache of `rank + rope` numbers; the model's own has 384."""

    def make(model: PreTrainedModel, calibration: torch.Tensor) -> PreTrainedModel:
        spec = MLA(kv_lora_rank=rank, qk_rope_head_dim=rope)
        return convert_latent_model(model, spec, calibration if calibrated else None, **fitting)[0]

    return make


def cases(steps: int) -> dict[str, tuple[float, Case]]:
    """Name -> numbers cached a token and layer, on average, and what makes the model."""
    plain = {"refit": False}
    return {
        "original": (384, lambda model, calibration: model),
        "51 %: GQA, mean, 8 layers keep 3 heads": ((8 * 384 + 22 * 128) / 30, pooled(8)),
        "50 %: MLA 128 + 64, weights alone": (192, latent(128, 64, calibrated=False)),
        "50 %: MLA 128 + 64, closed form": (192, latent(128, 64, **plain)),
        "50 %: MLA 128 + 64, and outputs refitted": (192, latent(128, 64)),
        "50 %: MLA 144 + 48, closed form": (192, latent(144, 48, **plain)),
        "50 %: MLA 160 + 32, closed form": (192, latent(160, 32, **plain)),
        f"50 %: MLA 128 + 64, and {steps} steps of regression": (192, latent(128, 64, steps=steps)),
        "33 %: GQA, mean, 1 head": (128, pooled(0)),
        "30 %: MLA 67 + 48, weights alone": (115, latent(67, 48, calibrated=False)),
        "30 %: MLA 67 + 48, closed form": (115, latent(67, 48, **plain)),
        "30 %: MLA 83 + 32, closed form": (115, latent(83, 32, **plain)),
        "30 %: MLA 75 + 40, closed form": (115, latent(75, 40, **plain)),
        "30 %: MLA 75 + 40, and outputs refitted": (115, latent(75, 40)),
        f"30 %: MLA 75 + 40, and {steps} steps of regression": (115, latent(75, 40, steps=steps)),
    }


def rows_of(text: str, tokenizer: object, rows: int, length: int) -> torch.Tensor:
    """Rows of tokens from places all over a text, `[rows, length]`."""
    wide = 12 * length  # characters, more than the tokens have
    starts = torch.arange(rows) * ((len(text) - wide) // rows)
    found = [tokenizer(text[start : start + wide]).input_ids[:length] for start in starts.tolist()]  # type: ignore[operator]
    return torch.tensor(found)


def read(paths: list[Path], pattern: str = "*") -> str:
    """The text of files, or of the files in folders."""
    files = [file for path in paths for file in (sorted(path.glob(pattern)) if path.is_dir() else [path])]
    return "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)


@torch.no_grad()
def predicted(model: PreTrainedModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Log-probabilities of the next token, a row at a time, in half precision."""
    return [model(row).logits[0, :-1].log_softmax(-1).half() for row in tokens.split(1)]


@torch.no_grad()
def measured(model: PreTrainedModel, tokens: torch.Tensor, truth: list[torch.Tensor]) -> dict[str, float]:
    """Cross-entropy and the divergence from the original's predictions, nats a token."""
    ce = kl = 0.0
    for row, wanted in zip(tokens.split(1), truth, strict=True):
        found = model(row).logits[0, :-1].log_softmax(-1)
        ce += nll_loss(found, row[0, 1:]).item()
        kl += kl_div(found, wanted.float(), log_target=True, reduction="sum").item() / len(wanted)
    return {"cross_entropy": ce / len(tokens), "kl": kl / len(tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=None, help="parts of the names of the cases to run")
    parser.add_argument("--calibration", nargs="*", type=Path, default=[])
    parser.add_argument("--rows", type=int, default=32, help="of calibration text, from each source")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--evaluated", type=int, default=12, help="rows of held-out text")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "save_pretrained")

    folder = ensure_sample("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sources = {"Python's standard library": read([Path(os.__file__).parent], "*.py")}
    sources |= {path.name: read([path]) for path in options.calibration}
    calibration = torch.cat([rows_of(text, tokenizer, options.rows, options.length) for text in sources.values()])
    held_out = rows_of(read([ensure_sample("shakespeare")], "*.txt"), tokenizer, options.evaluated, options.length)

    about = {
        "model": "SmolLM2-135M-Instruct, fp32, no training",
        "calibration": f"{len(calibration)} x {options.length} tokens: {', '.join(sources)}",
        "held_out": f"{len(held_out)} x {options.length} tokens of Shakespeare's plays",
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
    }
    truth = predicted(model, held_out)
    for name, (numbers, make) in cases(options.steps).items():
        if options.only and not any(part in name for part in options.only):
            continue
        start = time.perf_counter()
        made = make(model, calibration)
        seconds = time.perf_counter() - start
        row = {"numbers_per_token_and_layer": round(numbers, 1), "kv_share": round(numbers / 384, 3)}
        row |= {**measured(made, held_out, truth), "seconds": round(seconds, 1)}
        print(f"{name:60} CE {row['cross_entropy']:.4f}  KL {row['kl']:.4f}  {seconds:.0f} s", flush=True)
        if options.write:
            known = json.loads(OUT.read_text()) if OUT.exists() else {"about": about, "cases": {}}
            known["cases"][name] = row | ({} if known["about"] == about else {"about": about})
            OUT.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
