"""Time training steps on GPUs: the recipe, beside a plain loop on stock transformers and the recipe on its attentions.

    python scripts/bench_training.py [--cases smollm2 llama-1b] [--out docs/benchmarks/training_h200.json]
    torchrun --nproc-per-node 2 scripts/bench_training.py --contestants attnzoo [--out two_gpus.json]

Models have random weights and see random tokens. Every row is one document, which is what stock attention is fastest
on, or in the cases named `documents` several that do not see each other. All start from the same weights and see the
same tokens, and their losses and gradients have to agree. A step is forward, backward, clipping and AdamW; a time is
the median over steps, taken on the device, of one GPU's rows. `attnzoo-merged` runs projections of one input as one
matmul.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import attnzoo.hf  # noqa: F401  (registers attn_implementation="attnzoo")
from recipes import parallel
from recipes.compiling import compile_model
from recipes.heads import head_of
from recipes.losses import linear_cross_entropy
from recipes.merging import merge_projections
from recipes.module import Uptraining
from recipes.objectives import CE, Objective
from recipes.packed import pack, shifted_labels
from recipes.stages import Stage
from recipes.trainer import build_trainer
from recipes.windows import Windows

PEAK = 989e12  # bf16 flops a second of an H200 or H100 SXM, by its data sheet
STEPS, WARM_UP, COMPARED = 30, 8, 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there, to see that it runs
OPTIMIZER = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CLIP = 1.0
MOST_APART = {"loss": 2e-3, "gradient_norm": 3e-2}  # relative, in each of the first steps

CASES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "rows": 32,
        "length": 1024,
        "model": {
            **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
            **{"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "rope_theta": 1e5},
        },
    },
    "llama-1b": {
        "rows": 4,
        "length": 4096,
        "model": {
            **{"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
            **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rope_theta": 5e5},
        },
    },
}
for case in ("smollm2", "llama-1b"):
    CASES[f"{case}-documents"] = CASES[case] | {"documents": CASES[case]["length"] // 3}  # their mean length

CONTESTANTS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "attnzoo", "attnzoo-merged")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--compile", default="auto", help="trainer.compile of the recipe")
    parser.add_argument("--out", type=Path, help="write the rows here, as JSON")
    parser.add_argument("--commit", default="", help="what was measured")
    options = parser.parse_args()
    parallel.join("auto")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    device = {"device": torch.cuda.get_device_name(), "matmul_tflops": matmul_limit()} if DEVICE == "cuda" else {}
    rows: list[dict[str, Any]] = []
    for row in measurements(options.cases, options.contestants, options.compile):
        rows.append(row)
        if parallel.is_main_process():
            print(" ".join(f"{name}={shown(value)}" for name, value in row.items()), flush=True)
            if options.out:
                report = versions | device | {"commit": options.commit, "rows": rows}
                options.out.write_text(json.dumps(report, indent=1) + "\n")
    for case in options.cases:
        require_agreement([row for row in rows if row["case"] == case and "ms" in row])


def measurements(cases: list[str], contestants: list[str], compile: str) -> Iterator[dict[str, Any]]:
    """A row for each contestant in each case; one that cannot run says why."""
    for case in cases:
        for name in contestants:
            if name == "flash_attention_2" and find_spec("flash_attn") is None:
                yield {"case": case, "name": name, "skipped": "flash-attn is not installed"}
                continue
            torch._dynamo.reset()
            gc.collect()
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            attention = "sdpa" if name == "eager" else name.removesuffix("-merged")
            model = build(CASES[case]["model"], attention)
            if name.endswith("-merged"):
                merge_projections(model)
            run = plain_loop if name == "eager" else with_trainer if attention == "attnzoo" else recipe_loop
            measured = run(model, CASES[case], compile)
            yield {"case": case, "name": name, **measured.row(began, CASES[case])}
            del model


class Measured:
    """Step times on the device, and the losses and norms of the gradients, of one contestant."""

    def __init__(self) -> None:
        self.moments: list[Any] = []
        self.first: float | None = None  # when the first step was over
        self.loss: list[float] = []
        self.gradient_norm: list[float] = []

    def tick(self) -> None:
        """A step is over."""
        if self.first is None:
            wait()
            self.first = time.perf_counter()
        self.moments.append(moment())

    def row(self, began: float, case: Mapping[str, Any]) -> dict[str, Any]:
        wait()
        assert self.first is not None
        pairs = zip(self.moments[WARM_UP:-1], self.moments[WARM_UP + 1 :], strict=True)
        ms = median(milliseconds(*pair) for pair in pairs)
        gpus = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        tokens = case["rows"] * case["length"]
        return {
            "gpus": gpus,
            "tokens_per_step": tokens * gpus,
            "ms": ms,
            "tokens_per_s": tokens * gpus / ms * 1e3,
            "mfu": flops(case) * tokens / ms * 1e3 / PEAK,
            "start_s": self.first - began,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None,
            "loss": self.loss[:COMPARED],
            "gradient_norm": self.gradient_norm[:COMPARED],
        }


def plain_loop(model: PreTrainedModel, case: Mapping[str, Any], compile: str) -> Measured:
    """What one would write by hand: the model's logits, `F.cross_entropy`, autocast and AdamW."""

    def loss(inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        logits = model(**inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets)

    return loop(model, case, loss)


def recipe_loop(model: PreTrainedModel, case: Mapping[str, Any], compile: str) -> Measured:
    """What the recipe does, on rows instead of packed documents, which not every attention takes."""
    head = head_of(model)
    compile_model(model, compile, device=DEVICE)

    def loss(inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        return linear_cross_entropy(hidden.flatten(0, 1), targets=targets, **head._asdict()) / (targets != -100).sum()

    return loop(model, case, loss)


def loop(
    model: PreTrainedModel, case: Mapping[str, Any], loss_of: Callable[[dict[str, Tensor], Tensor], Tensor]
) -> Measured:
    """Trains without ever waiting for the device; all tokens lie there."""
    measured, numbers = Measured(), []
    batches = [rows_of(case, pieces) for pieces in pieces_of(case)]
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, fused=True, **OPTIMIZER)
    for batch in batches:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = loss_of(*batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        numbers.append(torch.stack([loss.detach(), norm]))
        measured.tick()
    measured.loss, measured.gradient_norm = torch.stack(numbers).t().tolist()
    return measured


def with_trainer(model: PreTrainedModel, case: Mapping[str, Any], compile: str) -> Measured:
    """The recipe as `attnzoo uptrain` runs it: Lightning's trainer, the module, packed batches from the host."""
    measured = Measured()

    class Watch(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            measured.tick()

    class Keep(DummyLogger):
        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            measured.loss.append(metrics["train/loss"])
            measured.gradient_norm.append(metrics["train/gradient_norm"])

    head_of(model)
    compile_model(model, compile, device=DEVICE)
    optimizer = {**OPTIMIZER, "method": "adamw", "schedule": "constant", "warmup": 0.0, "final": 1.0}
    stage = Stage("bench", 0, STEPS, (CE(),), "all", optimizer)
    module = Uptraining(model, [stage], [Objective(stage.terms)], gradient_clip_norm=CLIP)
    trainer = build_trainer(
        {
            **{"accelerator": DEVICE, "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "bf16-mixed"},
            **{"log_every_n_steps": 1, "progress_bar": False, "reshard_after_forward": True},
            "devices": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
        },
        max_steps=STEPS,
        callbacks=[Watch()],
        loggers=[Keep()],
    )
    batches = [pack(pieces) for pieces in pieces_of(case)]
    trainer.fit(module, train_dataloaders=Windows(_Loader(batches), steps=STEPS, pin=DEVICE == "cuda"))
    return measured


class _Loader:
    """Batches in order, as the training data gives them."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("a benchmark does not resume")


def build(config: Mapping[str, Any], attention: str) -> PreTrainedModel:
    """In fp32 on the GPU; the same weights for every attention."""
    torch.manual_seed(0)
    full = LlamaConfig(**config, max_position_embeddings=8192, tie_word_embeddings=True)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(full, attn_implementation=attention, dtype=torch.float32)
    return model.train()


def pieces_of(case: Mapping[str, Any]) -> Iterator[list[np.ndarray]]:
    """The documents of each step, row by row; small ids are frequent, so that there is something to learn."""
    draw = np.random.default_rng(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    for _ in range(STEPS):
        pieces = []
        for _ in range(case["rows"]):
            ids = (draw.random(case["length"]) ** 3 * case["model"]["vocab_size"]).astype(np.int64)
            cuts = draw.random(case["length"] - 1) < 1 / case.get("documents", math.inf)
            pieces += np.split(ids, np.flatnonzero(cuts) + 1)
        yield pieces


def rows_of(case: Mapping[str, Any], pieces: list[np.ndarray]) -> tuple[dict[str, Tensor], Tensor]:
    """The same as rows `[rows, length]` on the device, and the targets `[rows * length]`.

    Positions, by which transformers tells documents apart, are given only where there are several in a row.
    """
    packed = {name: t.to(DEVICE) for name, t in pack(pieces).items()}
    inputs = {"input_ids": packed["input_ids"].view(case["rows"], -1)}
    if "documents" in case:
        inputs["position_ids"] = packed["position_ids"].view(case["rows"], -1)
    return inputs, shifted_labels(packed)


def moment() -> Any:
    """Now, on the device."""
    if DEVICE == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(before: Any, after: Any) -> float:
    return (after - before) * 1e3 if DEVICE == "cpu" else before.elapsed_time(after)


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def flops(case: Mapping[str, Any]) -> float:
    """Of a token's forward and backward: 6 for every weight that multiplies, and causal attention's products."""
    m = case["model"]
    heads = m["num_attention_heads"] * m["head_dim"]
    attention = 2 * m["hidden_size"] * (heads + m["num_key_value_heads"] * m["head_dim"])
    layer = attention + 3 * m["hidden_size"] * m["intermediate_size"]
    weights = m["num_hidden_layers"] * layer + m["vocab_size"] * m["hidden_size"]
    return 6 * weights + 6 * m["num_hidden_layers"] * heads * case["length"]


def matmul_limit() -> float:
    """TFLOP/s of an 8192^3 bf16 matmul."""
    from triton.testing import do_bench

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / do_bench(lambda: a @ b, warmup=50, rep=200, return_mode="median") / 1e9


def require_agreement(rows: list[dict[str, Any]]) -> None:
    """Raises AssertionError where a contestant's first losses or gradients are not those of the first one."""
    for row in rows[1:]:
        for name, most in MOST_APART.items():
            for step, (mine, theirs) in enumerate(zip(row[name], rows[0][name], strict=True), start=1):
                apart = abs(mine - theirs) / theirs
                assert apart <= most, f"{row['case']} {row['name']}: {name} {mine} for {theirs} at step {step}"


def shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(f"{number:.4f}" for number in value[:3])
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
