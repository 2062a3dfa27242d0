"""Run the suites: warm caches, check, time, print, write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from attnzoo.bench import gate, report, table, timing
from attnzoo.bench.cases import Case, cases
from attnzoo.bench.contestants import Data, Unavailable, draw, prepare

PACKAGES = ("attnzoo", "triton", "flash-attn-4", "fa3-fwd", "nvidia-cutlass-dsl", "quack-kernels")
Row = dict[str, Any]


def run(suites: tuple[str, ...], out: Path, orders: Path | None, jobs: int, commit: str | None) -> int:
    """Times the suites; writes one JSON file a suite, tables and plots into `out`. Returns 1 if a result was wrong."""
    started = time.perf_counter()
    warnings.filterwarnings("ignore", message="Argument .* cannot be converted to a JitArgument")  # flash-attn-4's
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # what a warm-up compiled is found again
    todo = cases(suites)
    if jobs > 0:
        _warm_in_processes(suites, jobs)
        print(f"# compiled ahead in {time.perf_counter() - started:.0f} s", flush=True)
    about = machine(commit)
    about["limits"] = limits()
    print("# " + json.dumps(about["limits"]), flush=True)
    rows: list[Row] = []
    for suite in suites:  # each written when it is done
        some: list[Row] = []
        own = [case for case in todo if case.suite == suite]
        for together in [own] if suite == "features" else [[case] for case in own]:
            some += time_together(together)  # features are compared with one another
        rows += some
        about["seconds"] = round(time.perf_counter() - started)
        report.write(out / f"attention_{suite}_{report.slug(about['device'])}.json", about | {"rows": some})
        if orders is not None:
            table.write(orders, about, rows)
    report.draw(out)
    wrong = [row for row in rows if row.get("error_ratio", 0) > 1]
    print(f"# {len(rows)} rows, {len(wrong)} wrong, {about['seconds']} s")
    return int(bool(wrong))


def machine(commit: str | None) -> dict[str, Any]:
    """Device, versions and commit, as every JSON file names them."""
    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "packages": packages,
        "commit": commit or _git_commit(),
        # A folder of this machine says nothing elsewhere.
        "command": " ".join(["attnzoo", *(Path(a).name if a.startswith("/") else a for a in sys.argv[1:])]),
    }


def limits() -> dict[str, float]:
    """What the device reaches here and now: an 8192^3 bf16 product in TFLOP/s, a copy in GB/s read and written."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    y = torch.empty_like(x)
    product, copy = milliseconds(lambda: a @ b), milliseconds(lambda: y.copy_(x))
    return {"matmul_tflops": round(2 * 8192**3 / product / 1e9, 1), "copy_gbs": round(2 * 2**30 / copy / 1e6, 1)}


def milliseconds(function: Callable[[], object], warmup: int = 10, rep: int = 50) -> float:
    """The median of one call, the L2 cache cold each time."""
    from triton.testing import do_bench

    return float(do_bench(function, warmup=warmup, rep=rep, return_mode="median"))


def time_together(cases: Sequence[Case]) -> list[Row]:
    """Both directions of every contestant on these cases, checked first, then timed in turns and printed."""
    rows: list[Row] = []
    runs: list[tuple[Row, str, float, Callable[[], object]]] = []
    for case in cases:
        data, flops = draw(case), case.flops()
        truth, plain = gate.one_head(case, data, torch.float32), gate.one_head(case, data, torch.bfloat16)
        common = {"suite": case.suite, "case": case.name, "kind": case.kind, "dim": case.dim, "length": case.length}
        common |= {"grouped": case.q_heads != case.k_heads}
        for name in case.contestants:
            checked, forward = _checked(name, case, data, truth, plain)
            rows.append(common | {"contestant": name} | checked)
            if forward is not None:
                runs.append((rows[-1], "forward", flops, _inference(forward)))
                if _trains(name):
                    runs.append((rows[-1], "backward", 2.5 * flops, _backward(forward, data)))
            torch.cuda.empty_cache()
    for (row, key, flops, _), taken in zip(runs, timing.in_turns([function for *_, function in runs]), strict=True):
        row[f"{key}_ms"] = median(taken)
        row[f"{key}_tflops"] = flops / row[f"{key}_ms"] / 1e9
        row |= {f"{key}_spread": timing.spread(taken), "turns": len(taken)}
    for row in rows:
        print(report.line(row), flush=True)
    return rows


def _trains(name: str) -> bool:
    return not name.endswith(("fa3", "fa3-fwd"))


def _checked(
    name: str, case: Case, data: Data, truth: dict[str, Tensor], plain: dict[str, Tensor]
) -> tuple[dict[str, Any], Callable[[], Tensor] | None]:
    """What is known of a contestant before it is timed, and its forward; None if it cannot run or is wrong."""
    first = time.perf_counter()
    try:
        forward = prepare(name, case, data)
        trains = _trains(name)
        with torch.set_grad_enabled(trains):
            out = forward()
        found: dict[str, Tensor] = {"out": out}
        if trains:
            grads = torch.autograd.grad(out, data.leaves, data.d_out)
            found |= dict(zip(("dq", "dk", "dv", "dsinks"), grads, strict=False))
        torch.cuda.synchronize()
    except Unavailable as why:
        return {"unavailable": str(why)}, None
    except Exception as error:  # what a peer cannot do is a fact worth a row
        return {"unavailable": f"{type(error).__name__}: {error}".splitlines()[0][:200]}, None
    row: dict[str, Any] = {"first_call_s": round(time.perf_counter() - first, 2)}
    if case.dropout_p == 0:
        ratio, where = gate.worst(gate.same_head(case, found), plain, truth)
        row |= {"error_ratio": round(ratio, 3), "error_at": where}
        if not ratio <= 1:
            return row, None
    del found, out
    return row | (_peak(case, data, forward) if trains else {}), forward


def _inference(forward: Callable[[], Tensor]) -> Callable[[], object]:
    def run() -> Tensor:
        with torch.no_grad():
            return forward()

    return run


def _backward(forward: Callable[[], Tensor], data: Data) -> Callable[[], object]:
    """The backward alone, of one forward."""
    out = forward()
    return lambda: torch.autograd.grad(out, data.leaves, data.d_out, retain_graph=True)


def _peak(case: Case, data: Data, forward: Callable[[], Tensor]) -> dict[str, float]:
    """Peak memory of a forward and of a training step over what must be there: inputs, outputs, lse, gradients."""
    lse = 4 * case.batch * case.q_heads * case.length
    inputs, out = sum(t.nbytes for t in data.leaves), data.d_out.nbytes

    def peak(step: Callable[[], object]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def train() -> object:
        return torch.autograd.grad(forward(), data.leaves, data.d_out)

    one, both = peak(forward), peak(train)
    return {
        "forward_memory": (inputs + one) / (inputs + out + lse),
        "training_memory": (inputs + out + both) / (2 * inputs + 2 * out + lse),
    }


def _warm_in_processes(suites: tuple[str, ...], jobs: int) -> None:
    """Have the kernels that compile on first use compiled by several processes at once, into the caches on disk."""
    command = [sys.executable, "-W", "ignore", "-m", "attnzoo.bench.warm", *suites, "--share"]
    alone = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # each would start as many as there are cores
    share = [subprocess.Popen([*command, f"{n}/{jobs}"], stdout=subprocess.DEVNULL, env=alone) for n in range(jobs)]
    for process in share:
        process.wait()


def _git_commit() -> str | None:
    here = Path(__file__).parent
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
