"""Sweeps by hydra-submitit-launcher, with its launcher for this machine in the place of SLURM's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.recipes import Tiny

pytest.importorskip("submitit")
pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_each_run_of_a_sweep_is_a_job_with_a_folder_of_its_own(tmp_path):
    tiny = Tiny(tmp_path / "tiny")
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "ATTNZOO_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "attnzoo.cli", "uptrain", "-m", "hydra/launcher=submitit_local"]
    command += ["hydra.sweep.dir=sweep", *tiny.overrides, "max_steps=1", "seed=0,1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    for seed in (0, 1):
        session = json.loads((tmp_path / "sweep" / str(seed) / "run.json").read_text())["sessions"][0]
        assert session["seeds"]["everything"] == seed
        assert (tmp_path / "sweep" / str(seed) / "report.json").is_file()
