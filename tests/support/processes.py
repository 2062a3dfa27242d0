"""Runs of several processes, as torchrun starts them, that are killed or signalled where a test wants it."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

SCRIPT = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from recipes.checkpointing import Checkpoints

def signalling(self, trainer, module, *rest, original=Checkpoints.on_train_batch_end):
    if trainer.global_step == {step} and trainer.global_rank in {ranks}:
        os.kill(os.getpid(), {number})
    return original(self, trainer, module, *rest)

Checkpoints.on_train_batch_end = signalling
from attnzoo.cli import main
sys.exit(main(["uptrain", *sys.argv[1:]]))
"""


def torchrun(
    folder: Path,
    *overrides: str,
    processes: int = 2,
    step: int | None = None,
    number: int = 0,
    ranks: tuple[int, ...] = (0, 1),
) -> subprocess.CompletedProcess[str]:
    """`torchrun -m attnzoo.cli uptrain overrides` in `folder`; after `step`, before its checkpoint, `ranks` get signal
    `number`."""
    script = folder / "uptrain.py"
    script.write_text(SCRIPT.format(step=step, number=int(number), ranks=ranks), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    try:
        return subprocess.run(
            [*command, str(script), *overrides],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
    finally:
        script.unlink()
