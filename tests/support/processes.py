"""Other processes, forked from one that has imported PyTorch, Lightning and transformers, which takes each 7 seconds.

Runs of several are started as torchrun and srun start them, and get a signal where a test wants it.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["recipes.uptrain", "recipes.study"])

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
sys.exit(main([*{command!r}, *sys.argv[1:]]))
"""


def run_attnzoo(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`attnzoo arguments` in `folder`, with the environment's variables and these."""
    return _Forked(folder, variables, _run, str(_script(folder, command=())), arguments).wait()


def python(code: str, folder: Path = REPOSITORY, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -c code` in `folder`, where nothing that tests patched is patched."""
    return _Forked(folder, variables, exec, code, {"__name__": "__main__"}).wait()


def spawn(function: Callable[..., Any], *arguments: Any, processes: int = 2) -> None:
    """`function(rank, *arguments)` in as many processes; raises what any of them raises."""
    import torch.multiprocessing

    torch.multiprocessing.start_processes(function, arguments, nprocs=processes, start_method="forkserver")


def torchrun(folder: Path, *overrides: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """`torchrun -m attnzoo.cli uptrain overrides` in `folder`; each process imports all for itself."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "attnzoo.cli", "uptrain", *overrides]
    return subprocess.run(command, cwd=folder, env=_environment({}), capture_output=True, text=True, timeout=240)


def as_torchrun(folder: Path, *overrides: str, processes: int = 2, **signalled: Any) -> list[tuple[int, str]]:
    """Exit code and output of each process that torchrun would start; see `_script` for what else can be asked."""
    port = str(_free_port())
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    common |= {"GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": 0}
    each = [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    return _side_by_side(folder, _script(folder, **signalled), overrides, each)


def as_srun(folder: Path, *overrides: str, processes: int = 2, **signalled: Any) -> list[tuple[int, str]]:
    """The same of `srun` of SLURM, on one machine."""
    common = {"JOB_ID": "77", "JOB_NAME": "train", "NTASKS": processes, "NTASKS_PER_NODE": processes, "NNODES": 1}
    common |= {"NODEID": 0, "NODELIST": "127.0.0.1"}
    each = [{f"SLURM_{n}": v for n, v in {**common, "PROCID": r, "LOCALID": r}.items()} for r in range(processes)]
    port = _free_port()
    return _side_by_side(folder, _script(folder, **signalled), overrides, [one | {"MASTER_PORT": port} for one in each])


def _side_by_side(
    folder: Path, script: Path, overrides: tuple[str, ...], each: list[dict[str, Any]]
) -> list[tuple[int, str]]:
    started = [_Forked(folder, variables, _run, str(script), overrides) for variables in each]
    # As a launcher does it: when one has failed, the others are not waited for.
    left = [one.process for one in started]
    while left:
        if not wait([process.sentinel for process in left], timeout=240):
            break
        left = [process for process in left if process.is_alive()]
        if any(one.process.exitcode not in (0, None) for one in started):
            break
    ended = [one.wait(20 if left else 240) for one in started]
    return [(one.returncode, one.stdout + one.stderr) for one in ended]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _environment(variables: Mapping[str, Any]) -> dict[str, str]:
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    changes = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in variables.items()}}
    return {**os.environ, **changes}


class _Forked:
    """A function that runs in a process of its own, in a folder, with variables beside those of this process."""

    def __init__(self, folder: Path, variables: Mapping[str, Any], function: Callable[..., Any], *arguments: Any):
        self.outputs = [folder.parent / f"{folder.name}_{uuid.uuid4().hex}.{name}" for name in ("out", "err")]
        rest = (_environment(variables), [str(path) for path in self.outputs], function, arguments)
        self.process = _FORKS.Process(target=_child, args=(str(folder), *rest))
        self.process.start()

    def wait(self, seconds: float = 240) -> subprocess.CompletedProcess[str]:
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        out, err = (path.read_text() if path.exists() else "" for path in self.outputs)
        for path in self.outputs:
            path.unlink(missing_ok=True)
        return subprocess.CompletedProcess([], self.process.exitcode, out, err)


def _child(
    folder: str, environment: dict[str, str], outputs: list[str], function: Callable[..., Any], arguments: tuple
) -> None:
    for number, path in enumerate(outputs, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    import torch

    torch.set_num_threads(1)
    function(*arguments)


def _run(script: str, arguments: tuple[str, ...]) -> None:
    """`python script arguments`."""
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def _script(
    folder: Path,
    *,
    command: tuple[str, ...] = ("uptrain",),
    step: int | None = None,
    number: int = 0,
    ranks: tuple[int, ...] = (0, 1),
) -> Path:
    """Runs a command of attnzoo, and gives `ranks` the signal `number` after `step`, before its checkpoint."""
    script = folder.parent / f"{folder.name}_attnzoo.py"
    script.write_text(SCRIPT.format(command=command, step=step, number=int(number), ranks=ranks), encoding="utf-8")
    return script
