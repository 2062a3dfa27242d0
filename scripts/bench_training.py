"""Time training steps on GPUs: the recipe, beside a plain loop on stock transformers and the recipe on its attentions.

    python scripts/bench_training.py [--cases smollm2 llama-1b] [--out docs/benchmarks/training_h200.json]
    torchrun --nproc-per-node 2 scripts/bench_training.py --contestants attnzoo [--out two_gpus.json]

Models have random weights and see random tokens. Every row is one document, which is what stock attention is fastest
on, or in the cases named `documents` several that do not see each other. All start from the same weights and see the
same tokens, and their losses and gradients have to agree. A step is forward, backward, clipping and AdamW.

Contestants take turns of a few steps in one process. A time is the median over the steps of all turns but the first, on
the device's clock, without each turn's first step, for which the device had to wait.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from training_steps import DEVICE, flops, plain_loop, recipe_loop, with_trainer

from attnzoo.bench.running import limits
from recipes import parallel
from recipes.meters import peak_flops

TURNS, TURN, COMPARED = 4, 5, 8  # steps of a turn, and steps whose losses are compared
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

# "eager" is the plain loop; "attnzoo" is the recipe as it runs, on packed documents under Lightning's trainer; all
# others are the recipe's step on rows, by their attention.
CONTESTANTS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_4", "attnzoo-rows", "attnzoo")
PACKAGES = {"flash_attention_2": "flash_attn.flash_attn_interface", "flash_attention_4": "flash_attn.cute"}


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
    device = {"device": torch.cuda.get_device_name(), **limits()} if DEVICE == "cuda" else {}
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
    """A row for each contestant in each case; one of transformers' that cannot run says why."""
    for case in cases:
        torch._dynamo.reset()
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        for name, measured in in_turns(CASES[case], contestants, compile).items():
            yield {"case": case, "name": name, **measured.row(CASES[case])}


def in_turns(case: Mapping[str, Any], contestants: list[str], compile: str) -> dict[str, Measured]:
    """All contestants' steps. A trainer cannot be left in the middle, so the others have their turns inside of it."""
    all_measured = {name: Measured() for name in contestants}
    loops = {}
    for name, measured in all_measured.items():
        package = PACKAGES.get(name)
        if package is not None and not installed(package):
            measured.skipped = f"{package.partition('.')[0]} is not installed"
        elif name != "attnzoo":
            loops[name] = (plain_loop if name == "eager" else recipe_loop)(name, case, compile, measured, TURNS * TURN)

    def turns_of_others() -> None:
        for name, steps in list(loops.items()):
            measured = all_measured[name]
            try:
                measured.begin()
                for _ in range(TURN):
                    next(steps)
                    measured.tick()
                measured.end()
            except Exception as error:
                if name.startswith("attnzoo"):
                    raise
                measured.skipped = f"{type(error).__name__}: {error}".splitlines()[0]
                del loops[name]

    if "attnzoo" in contestants:
        with_trainer(case, compile, all_measured["attnzoo"], TURNS, TURN, turns_of_others)
    else:
        for _ in range(TURNS):
            turns_of_others()
    for steps in loops.values():
        next(steps, None)  # to its end
    return all_measured


def installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


class Measured:
    """Step times on the device, memory, and the losses and norms of the gradients, of one contestant."""

    def __init__(self) -> None:
        self.turns: list[list[Any]] = []  # moments: when a turn begins, and when each of its steps is over
        self.loss: list[float] = []
        self.gradient_norm: list[float] = []
        self.skipped = ""  # why there is nothing
        self.start_s = 0.0  # until the first turn is over, with all that is compiled
        self._others = self._held = self._peak = 0  # bytes

    def begin(self) -> None:
        """A turn begins; what its first one allocates and keeps is this contestant's own."""
        wait()
        self._began = time.perf_counter()
        if DEVICE == "cuda":
            self._others = torch.cuda.memory_allocated() - self._held
            torch.cuda.reset_peak_memory_stats()
        self.turns.append([moment()])

    def tick(self) -> None:
        """A step is over."""
        self.turns[-1].append(moment())

    def end(self) -> None:
        """A turn is over."""
        wait()
        self.start_s = self.start_s or time.perf_counter() - self._began
        if DEVICE == "cuda":
            self._peak = max(self._peak, torch.cuda.max_memory_allocated() - self._others)
            self._held = torch.cuda.memory_allocated() - self._others

    def row(self, case: Mapping[str, Any]) -> dict[str, Any]:
        if self.skipped:
            return {"skipped": self.skipped}
        times = [milliseconds(*pair) for turn in self.turns[1:] for pair in pairwise(turn[1:])]
        ms = median(times)
        gpus = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        tokens = case["rows"] * case["length"]
        return {
            "gpus": gpus,
            "tokens_per_step": tokens * gpus,
            "ms": ms,
            "ms_of_turns": [median(milliseconds(*pair) for pair in pairwise(turn[1:])) for turn in self.turns[1:]],
            "tokens_per_s": tokens * gpus / ms * 1e3,
            **mfu(case, tokens / ms * 1e3),
            "start_s": self.start_s,
            "peak_gib": self._peak / 2**30,
            "loss": self.loss[:COMPARED],
            "gradient_norm": self.gradient_norm[:COMPARED],
        }


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


def mfu(case: Mapping[str, Any], tokens_per_s: float) -> dict[str, float]:
    """What a GPU reaches of its peak, where that is known."""
    peak = peak_flops(torch.cuda.get_device_name(), "bf16-mixed") if DEVICE == "cuda" else None
    return {} if peak is None else {"mfu": flops(case) * tokens_per_s / peak}


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
