"""Every kernel compiles for every supported GPU, on a machine without one, and the report says what each takes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/compile_kernels.py"
OPS = ["softmax", "decoding", "latent", "linear", "losses"]


def compiled(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the script as CI does: in a process of its own, as this one may interpret the kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def listed() -> dict[str, list[tuple[str, str, int, int]]]:
    """Each op's builds: name, kernel, and the compute capabilities from which on and up to which each exists."""
    rooms = {op: "recipes.losses_builds" if op == "losses" else f"attnzoo.ops.{op}.triton.builds" for op in OPS}
    code = f"""
import importlib, json
builds = {{op: importlib.import_module(room).builds() for op, room in {rooms}.items()}}
print(json.dumps({{op: [(b.name, b.kernel.__name__, b.least, b.most) for b in own] for op, own in builds.items()}}))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {op: [tuple(row) for row in own] for op, own in json.loads(done.stdout).items()}


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a machine with two cores and an empty cache
@pytest.mark.parametrize("op", OPS)
def test_every_kernel_compiles_for_every_gpu_and_reports_what_it_takes(op: str, listed, tmp_path: Path) -> None:
    builds = listed[op]
    assert builds and len({name for name, *_ in builds}) == len(builds), "two builds of one name"
    done = compiled("--ops", op, "--out", tmp_path / "report.json")
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if "FAILED" in line)
    report = json.loads((tmp_path / "report.json").read_text())
    assert re.fullmatch(r"\d+\.\d+.*", report["triton"])
    found = {(row["kernel"], row["target"]) for row in report["kernels"]}
    assert {name for name, target in found if target == "sm_90"} == {name for name, *_ in builds}
    kernel_of = {name: kernel for name, kernel, *_ in builds}
    for target in ("sm_80", "sm_100"):
        there = {kernel for _, kernel, least, most in builds if least <= int(target[3:]) <= most}
        assert {kernel_of[name] for name, on in found if on == target} == there
    for row in report["kernels"]:
        assert 0 < row["registers"] <= 255 and row["stack_bytes"] >= 0 and row["shared_bytes"] >= 0, row


@pytest.mark.slow
def test_a_kernel_that_does_not_compile_fails_the_script_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "import triton\n"
        "import triton.language as tl\n\n\n"
        "@triton.jit\n"
        "def broken(x, BLOCK: tl.constexpr):\n"
        "    tl.store(x + tl.arange(0, BLOCK), missing)\n"
    )
    (tmp_path / "main.py").write_text(
        f"import sys\nsys.path[:0] = [{str(SCRIPT.parent)!r}, {str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "import compile_kernels\n"
        "from broken import broken\n"
        "from attnzoo.ops.launching import Build\n"
        "build = Build('broken', broken, {'x': '*fp32', 'BLOCK': 'constexpr'}, {'BLOCK': 16})\n"
        "compile_kernels.builds = lambda op: [build]\n"
        "if __name__ == '__main__':\n"
        "    sys.argv = ['x', '--ops', 'softmax', '--targets', '90', '--jobs', '1']\n"
        "    sys.exit(compile_kernels.main())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, tmp_path / "main.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "broken" in done.stdout and "FAILED" in done.stdout and "0 of 1 kernels compile" in done.stdout
