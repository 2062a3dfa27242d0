"""Pictures of masks, and the patterns' files run as programs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import attnzoo.masks
from attnzoo.masks import Dilated, Documents, Mask, PerHead, SlidingWindow

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.mark.parametrize(
    "mask", [SlidingWindow(4) | Documents([0, 4, 16]), PerHead([Dilated(2, s) for s in range(1, 6)])]
)
def test_drawing_saves_a_picture(mask: Mask, tmp_path: Path) -> None:
    mask.draw(tmp_path / "mask.png", 16, 12)
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")


def test_a_pattern_run_as_a_program_saves_its_picture_and_prints_it(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "attnzoo.masks.sliding_window", "--length", "20"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[18] == "· · · " + "■ " * 16 + "·"
    assert lines[20].startswith("SlidingWindow(window=16): 50.0% of the pairs visible at length 20")
    assert (tmp_path / "sliding_window.png").is_file() and not done.stderr


def test_every_pattern_runs_as_a_program(tmp_path: Path) -> None:
    names = sorted({*attnzoo.masks._HOME.values()} - {"combine"})
    code = "import runpy, sys\nfor name in sys.argv[1:]:\n    sys.argv = [name, '--length', '70']\n"
    code += "    runpy.run_module('attnzoo.masks.' + name, run_name='__main__', alter_sys=True)"
    subprocess.run([sys.executable, "-c", code, *names], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, check=True)
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == names
