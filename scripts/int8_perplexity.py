"""What an int8 cache costs a real model: its perplexity through each kind of cache, on held-out text.

    python scripts/int8_perplexity.py [--rows 4] [--length 2048] [--chunk 16] [--dtype bfloat16] [--write [FILE]]

SmolLM2-135M-Instruct reads Shakespeare's plays and the King James Bible. Tokens go through the cache as they do in
decoding, `--chunk` at a time: all but the first chunk attend to what the cache gives back, which is int8 but for the
newest 64 tokens. Latents are those of the model converted to latent attention with as many numbers a token (320 and
64 for 384), calibrated on Python's standard library.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from mla_damage import read, rows_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import attnzoo.hf
from attnzoo import MLA
from attnzoo.caches import Int8Cache, PagedInt8Cache
from attnzoo.hf.latent_convert import convert_latent_model
from recipes.samples import ensure_sample

OUT = Path(__file__).parents[1] / "docs" / "benchmarks" / "int8_smollm2.json"
BAR = 0.5  # percent
CASES = {"keys and values": ("contiguous", "int8", "paged_int8"), "latents": ("contiguous", "int8")}
SAMPLES = ("shakespeare", "bible")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="of each text")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--chunk", type=int, default=16, help="tokens a step")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of model and cache")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", type=Path, nargs="?", const=OUT, help="into this file, beside other runs' rows")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "save_pretrained")

    folder = ensure_sample("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="attnzoo").eval()
    model.to(options.device)
    texts = {name: read([ensure_sample(name)], "*.txt") for name in SAMPLES}
    rows = {name: rows_of(text, tokenizer, options.rows, options.length) for name, text in texts.items()}
    tokens = torch.cat(list(rows.values())).to(options.device)
    run = {"dtype": options.dtype, "chunk": options.chunk, "rows": options.rows, "length": options.length}
    found: list[dict[str, Any]] = []
    for what in options.only:
        made = model if what == "keys and values" else latent(folder, tokenizer, dtype).to(options.device)
        base: Tensor | None = None
        for kind in CASES[what]:
            start = time.perf_counter()
            losses, share = through_cache(made, tokens, kind, options.chunk)
            base = losses if base is None else base
            for name, part, plain in zip(
                (*rows, "both"), (*losses.split(options.rows), losses), (*base.split(options.rows), base), strict=True
            ):
                row = {**run, "cached": what, "cache": kind, "text": name, **compared(part, plain)}
                row |= {"int8_share": round(share, 4), "seconds": round(time.perf_counter() - start)}
                found.append(row)
                print(line(row), flush=True)
    if options.write:
        write(options.write, run, found, options.device)


def latent(folder: Path, tokenizer: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model with latent attention, in the closed form."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    calibration = rows_of(read([Path(os.__file__).parent], "*.py"), tokenizer, 4, 512)
    spec = MLA(kv_lora_rank=320, qk_rope_head_dim=64)
    return convert_latent_model(model, spec, calibration, refit=False)[0].to(dtype)


@torch.no_grad()
def through_cache(model: PreTrainedModel, tokens: Tensor, kind: Any, chunk: int) -> tuple[Tensor, float]:
    """Cross-entropy of each next token `[B, S - 1]` in nats, and the share of keys attended to that came from int8.

    Args:
        tokens: `[B, S]`; the first chunk is the prompt, others are steps.
        kind: of cache, as `attnzoo.hf.cache_for` names it.
        chunk: tokens a step.
    """
    batch, length = tokens.shape
    cache = attnzoo.hf.cache_for(model, batch, length, kind)
    losses, coded, read = [], 0, 0
    for start in range(0, length, chunk):
        step = tokens[:, start : start + chunk]
        positions = torch.arange(start, start + step.shape[1], device=tokens.device).expand(batch, -1)
        logits = model(input_ids=step, position_ids=positions, past_key_values=cache, use_cache=True).logits
        after = tokens[:, start + 1 : start + 1 + chunk]
        scores = logits[:, : after.shape[1]].float().flatten(0, 1)
        losses.append(torch.nn.functional.cross_entropy(scores, after.flatten(), reduction="none").view_as(after))
        memory = cache.memories[0]
        exact = memory.residual if isinstance(memory, Int8Cache | PagedInt8Cache) else length
        end = start + step.shape[1]
        for query in range(start, end):
            read += query + 1
            coded += max(end - exact, 0) if start > 0 else 0
    return torch.cat(losses, dim=1), coded / read


def compared(losses: Tensor, plain: Tensor) -> dict[str, float]:
    """Perplexity, its change against the cache that rounds nothing, and the standard error of that change, percent."""
    change = (losses - plain).double().flatten()
    return {
        "perplexity": round(math.exp(losses.double().mean().item()), 5),
        "change_percent": round(math.expm1(change.mean().item()) * 100, 4),
        "standard_error": round(change.std().item() / math.sqrt(len(change)) * 100, 4),
    }


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['dtype']} {row['cached']:16} {row['cache']:11} {row['text']:12} perplexity {row['perplexity']:9.4f} "
        f"{row['change_percent']:+.3f} % (standard error {row['standard_error']:.3f}), {row['int8_share']:.0%} of keys "
        f"read as int8, {row['seconds']} s"
    )


def write(path: Path, run: dict[str, Any], found: list[dict[str, Any]], device: str) -> None:
    """Put these rows into the file, in the place of rows of the same settings."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {
        "model": "SmolLM2-135M-Instruct",
        "texts": "rows from places all over Shakespeare's plays and the King James Bible",
        "bar_percent": BAR,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    found = [row | {"commit": commit} for row in found]
    new = {(row["cached"], *run.values()) for row in found}
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in old if (row["cached"], *(row[name] for name in run)) not in new]
    path.write_text(json.dumps({"about": about, "rows": kept + found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
