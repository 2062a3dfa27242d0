"""Compile every Triton kernel for every supported GPU, on a machine without one, and report what it takes.

    python scripts/compile_kernels.py [--ops softmax linear] [--targets 80 90 100] [--every] [--out report.json]

Each op lists its kernels' specialisations in `attnzoo/ops/<op>/triton/builds.py`, the recipes' losses do in
`recipes/losses_builds.py`. All of them are compiled for sm_90, and the first of each kernel for the other targets; with
--every all for all. Exits with status 1 if one fails.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

OPS = ("softmax", "decoding", "latent", "linear", "losses")
TARGETS = (80, 90, 100)
MAIN = 90


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--ops", nargs="+", default=OPS, choices=OPS)
    arguments.add_argument("--targets", nargs="+", type=int, default=TARGETS, help="compute capabilities, times ten")
    arguments.add_argument("--every", action="store_true", help="every specialisation for every target")
    arguments.add_argument("--out", type=Path, help="write the report here, as JSON")
    arguments.add_argument("--jobs", type=int, default=os.cpu_count())
    options = arguments.parse_args()
    work = [(op, *row) for op in options.ops for row in rows_of(builds(op), options.targets, options.every)]
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(compile_one, *zip(*work, strict=True)))
    for row in rows:
        print(describe(row), flush=True)
    if options.out:
        options.out.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1) + "\n")
    failed = sum("error" in row for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} kernels compile")
    return int(failed > 0)


def builds(op: str) -> list:
    """What the op's room lists; nothing where it has no kernels."""
    name = "recipes.losses_builds" if op == "losses" else f"attnzoo.ops.{op}.triton.builds"
    try:
        return list(importlib.import_module(name).builds())
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            return []
        raise


def rows_of(listed: list, targets: list[int], every: bool) -> list[tuple[str, int]]:
    """Which build is compiled for which target."""
    rows = []
    for target in targets:
        done = set()
        for build in (build for build in listed if build.least <= target <= build.most):
            name = build.kernel.__name__
            if every or target == MAIN or name not in done:
                rows.append((build.name, target))
            done.add(name)
    return rows


def compile_one(op: str, name: str, target: int) -> dict:
    """Compile one build for one target; a row of the report."""
    row = {"op": op, "kernel": name, "target": f"sm_{target}"}
    build = next(build for build in builds(op) if build.name == name)
    start = time.perf_counter()
    driver.set_active(Elsewhere(target))
    try:
        compiled = triton.compile(
            source_of(build.kernel)(build.kernel, dict(build.signature), dict(build.constants), aligned(build)),
            target=GPUTarget("cuda", target, 32),
            options={"num_warps": build.num_warps, "num_stages": build.num_stages},
        )
    except Exception as error:  # whatever the compiler raises is the report's business
        return row | {"error": f"{type(error).__name__}: {str(error)[-2000:]}"}
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row | {"shared_bytes": compiled.metadata.shared} | resources(compiled.asm["cubin"])


class Elsewhere:
    """A driver for a kernel that asks which GPU it is compiled for."""

    def __init__(self, target: int) -> None:
        self.target = GPUTarget("cuda", target, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target


def source_of(kernel) -> type[ASTSource]:
    """What Triton compiles: kernels in Gluon say their layouts themselves."""
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def aligned(build) -> dict:
    """Pointers and strides are multiples of 16 in nearly all calls, and without that nothing is copied in vectors."""
    names = [(at, name) for at, name in enumerate(build.kernel.arg_names) if name not in build.constants]
    wide = [at for at, name in names if build.signature[name].startswith("*") or name.startswith("stride_")]
    return {(at,): [["tt.divisibility", 16]] for at in wide}


def resources(cubin: bytes) -> dict:
    """Registers a thread and bytes of local memory, where spilled registers go, of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return {"registers": int(found["REG"]), "stack_bytes": int(found["STACK"])}


def describe(row: dict) -> str:
    """A row of the report as a line."""
    start = f"{row['op']:9s} {row['kernel']:44s} {row['target']:7s}"
    if "error" in row:
        return f"{start} FAILED {row['error']}"
    numbers = f"{row['registers']:4d} registers {row['stack_bytes']:5d} B stack {row['shared_bytes'] / 1024:6.1f} KiB"
    return f"{start} {numbers} {row['seconds']:6.2f} s"


if __name__ == "__main__":
    sys.exit(main())
