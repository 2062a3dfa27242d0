"""Runs of several processes, as torchrun or srun start them, that get a signal where a test wants it."""

import os
import socket
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


def torchrun(folder: Path, *overrides: str, processes: int = 2, **signalled) -> subprocess.CompletedProcess[str]:
    """`torchrun -m attnzoo.cli uptrain overrides` in `folder`; see `_script` for what else can be asked."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(_script(folder, **signalled)), *overrides]
    return subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, timeout=240)


def srun(folder: Path, *overrides: str, processes: int = 2, **signalled) -> list[tuple[int, str]]:
    """The same as `srun` of SLURM would start it on one machine; exit code and output of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"JOB_ID": "77", "JOB_NAME": "train", "NTASKS": processes, "NTASKS_PER_NODE": processes, "NNODES": 1}
    common |= {"NODEID": 0, "NODELIST": "127.0.0.1"}
    script, started = _script(folder, **signalled), []
    for rank in range(processes):
        variables = {f"SLURM_{name}": str(v) for name, v in {**common, "PROCID": rank, "LOCALID": rank}.items()}
        started.append(
            subprocess.Popen(
                [sys.executable, str(script), *overrides],
                cwd=folder,
                env={**_environment(), **variables, "MASTER_PORT": str(port)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=240)[0] for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def _script(folder: Path, *, step: int | None = None, number: int = 0, ranks: tuple[int, ...] = (0, 1)) -> Path:
    """Gives `ranks` the signal `number` after `step`, before its checkpoint."""
    script = folder.parent / f"{folder.name}_uptrain.py"
    script.write_text(SCRIPT.format(step=step, number=int(number), ranks=ranks), encoding="utf-8")
    return script


def _environment() -> dict[str, str]:
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
