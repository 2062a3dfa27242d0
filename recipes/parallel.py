"""The processes of a run: who started them, which one this is, and how they agree without asking a GPU.

torchrun and srun start all processes of a run at once; else Lightning starts the others when training begins. Python
objects and flags travel through gloo, so that nobody waits for a GPU, and large tensors through NCCL.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import transformers
from datasets import disable_progress_bars
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins.environments import ClusterEnvironment
from omegaconf import DictConfig

log = logging.getLogger(__name__)

T = TypeVar("T")
_PATIENT: list[dist.ProcessGroup] = []  # the group in which processes wait for the main one
PATIENCE = timedelta(days=7)  # for the main process, which converts and evaluates while the others wait


def launcher() -> ClusterEnvironment | None:
    """What started the processes of this run, torchrun or srun; None where Lightning is to start them."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if "SLURM_NTASKS" in os.environ and SLURMEnvironment.detect():
        return SLURMEnvironment(auto_requeue=False)  # recipes.checkpointing saves, and the exit code asks for a requeue
    return None


def is_main_process() -> bool:
    """Whether this process converts, evaluates, writes the run folder and prints."""
    started_by = launcher()
    if started_by is not None:
        return started_by.global_rank() == 0
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"


def world_size(trainer: Mapping[str, Any]) -> int:
    """How many processes train, by a conf/trainer group."""
    devices = trainer["devices"]
    return (devices if isinstance(devices, int) else len(devices)) * trainer["num_nodes"]


def follow_launcher(trainer: DictConfig) -> None:
    """Sets devices and num_nodes of a conf/trainer group, in place, to what torchrun or srun has started.

    Raises:
        ValueError: when the group asks for several nodes, and nothing has started their processes.
    """
    started_by = launcher()
    if started_by is None:
        if trainer.num_nodes > 1:
            raise ValueError(
                f"trainer.num_nodes is {trainer.num_nodes}: start runs on several nodes with torchrun or srun, so that "
                "every node has its processes"
            )
        return
    processes = started_by.world_size()
    nodes = _nodes(started_by, processes)
    if world_size(trainer) not in (1, processes):
        name = "torchrun" if isinstance(started_by, TorchElasticEnvironment) else "srun"
        log.warning("%s started %d processes, which train, whatever trainer.devices says", name, processes)
    trainer.devices, trainer.num_nodes = processes // nodes, nodes


def require_processes_for_multirun(trainer: DictConfig) -> None:
    """Raises ValueError where each run of a --multirun would have to start processes, which would start it again."""
    if world_size(trainer) > 1 and launcher() is None:
        raise ValueError(
            "--multirun runs on one device, or by hydra/launcher=submitit_slurm on several; start the runs one by one "
            "with trainer.devices above 1"
        )


def be_quiet() -> None:
    """Lets only the main process print; errors still come out of every one."""
    if not is_main_process():
        logging.getLogger().setLevel(logging.ERROR)
        disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def join(accelerator: str) -> None:
    """Connects the processes that torchrun or srun has started; does nothing where Lightning will start them."""
    started_by = launcher()
    if started_by is None or started_by.world_size() == 1 or dist.is_initialized():
        return
    on_gpu = uses_gpu(accelerator)
    os.environ["MASTER_ADDR"] = started_by.main_address
    os.environ["MASTER_PORT"] = str(started_by.main_port)
    if on_gpu:
        torch.cuda.set_device(started_by.local_rank())
    dist.init_process_group(backend(on_gpu), rank=started_by.global_rank(), world_size=started_by.world_size())
    _PATIENT.append(dist.new_group(backend="gloo", timeout=PATIENCE))


def backend(on_gpu: bool) -> str:
    """Of torch.distributed: gloo for what lies on the CPU, and NCCL for what lies on a GPU."""
    return "cpu:gloo,cuda:nccl" if on_gpu else "gloo"


def uses_gpu(accelerator: str) -> bool:
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def run_folder(own: Path) -> Path:
    """The main process's folder, in every process: clocks differ, and so does what each makes of ${now:}."""
    if not dist.is_initialized():
        return own
    folder = share(own.absolute())
    if own.absolute() != folder and own.is_relative_to(tempfile.gettempdir()):
        shutil.rmtree(own, ignore_errors=True)  # see `folder_of_this_process`
    return folder


def folder_of_this_process(resume: str | None, fresh: str) -> str:
    """Where Hydra lets this process log: the run that is resumed, or a new folder.

    Processes that torchrun or srun started beside the main one get an empty folder elsewhere: their clock may already
    show another second, and the folder that they make by it would stay behind.
    """
    if launcher() is not None and not is_main_process():
        return tempfile.mkdtemp(prefix="attnzoo-process-")
    return fresh if resume in (None, "auto") else str(resume)


def share(value: T) -> T:
    """The main process's value, in every process."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: T) -> list[T]:
    """Every process's value, by rank, in every process."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def largest(values: Sequence[int]) -> list[int]:
    """Each number's maximum over all processes; it travels through gloo where that is there."""
    if not dist.is_initialized():
        return list(values)
    through_gloo = "cpu:gloo" in dist.get_backend_config()
    numbers = torch.tensor(values, dtype=torch.int64, device="cpu" if through_gloo else "cuda")
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return numbers.tolist()


def wait_for_all() -> None:
    """Returns when every process has come here, however long that takes; where one dies before, the others end too.

    Does nothing where Lightning starts the others: they live only while the model trains.
    """
    if not _PATIENT:
        return
    try:
        dist.barrier(_PATIENT[0])
    except RuntimeError as error:
        if is_main_process():
            raise
        log.debug("another process ended: %s", error)
        sys.exit(1)  # without a word: the one that ended has said why


def _nodes(started_by: ClusterEnvironment, processes: int) -> int:
    if isinstance(started_by, TorchElasticEnvironment):
        return processes // int(os.environ["LOCAL_WORLD_SIZE"])
    return int(os.environ.get("SLURM_NNODES", "1"))
