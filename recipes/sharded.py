"""FSDP2: every process holds a part of the weights, their gradients and the optimizer's state (arXiv 2304.11277).

Each decoder layer gathers its weights when it runs; what is left (embeddings, last norm, head) is gathered for a whole
micro-batch. Weights and optimizer state stay in their own dtype, fp32 as a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from recipes import parallel
from recipes.checkpoint_files import in_all, read_checkpoint, write_checkpoint
from recipes.checkpoint_state import Stored, load_whole, over_tensors
from recipes.packed import TAKES_BOUNDARIES
from recipes.spread import Spreader, fill, without_weights


class Everyone:
    """All processes of a run, for what they write together."""

    def __init__(self) -> None:
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def gather(self, value: Any) -> list[Any]:
        return parallel.gather(value)


class Replicated(DDPStrategy):
    """DDP; the main process writes a checkpoint, and the others learn whether it could."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        in_all(Everyone(), lambda: super(Replicated, self).save_checkpoint(checkpoint, filepath))


class Sharded(ModelParallelStrategy):
    """FSDP2 over all processes.

    Args:
        mixed: compute in bf16, and add gradients up over the processes in fp32; else all in the weights' dtype.
        reshard_after_forward: a layer gives its gathered weights back after its forward pass, and gathers them again
            for the backward; else it keeps them until then: more memory, less traffic.
        shard_teacher: the teacher is shared out too; else every process holds all of it.
        process_group_backend: of torch.distributed.
    """

    lightning_restore_optimizer = True  # type: ignore[assignment]  # by load_optimizer_state_dict, as everywhere

    def __init__(
        self, *, mixed: bool, reshard_after_forward: bool, shard_teacher: bool, process_group_backend: str
    ) -> None:
        super().__init__(tensor_parallel_size=1, process_group_backend=process_group_backend)
        self.mixed = mixed
        self.reshard_after_forward = reshard_after_forward
        self.shard_teacher = shard_teacher
        self.whole: Whole | None = None
        self._skeleton: nn.Module | None = None
        self._placed: WeakSet[nn.Module] = WeakSet()  # teachers

    def setup_environment(self) -> None:
        assert self.cluster_environment is not None
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, model: nn.Module) -> None:
        """Cuts `model` up, in place, with the main process's weights; Lightning's `configure_model` calls this.

        Raises:
            ValueError: for an attention implementation that reads one document after the other: the processes have
                different numbers of documents, and gather each layer's weights together.
        """
        attention = getattr(model.config, "_attn_implementation", None)
        if attention not in TAKES_BOUNDARIES:
            raise ValueError(
                f"trainer.strategy=fsdp needs an attention that takes packed documents; model.attn_implementation is "
                f"{attention!r}, allowed are {', '.join(sorted(TAKES_BOUNDARIES))}"
            )
        self._skeleton = without_weights(model)
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if self.mixed else None,
            reduce_dtype=torch.float32 if self.mixed else None,
            cast_forward_inputs=False,
        )
        settings = {
            "mesh": self.device_mesh["data_parallel"],
            "mp_policy": policy,
            "reshard_after_forward": self.reshard_after_forward,
        }
        spreader = Spreader(model, self.root_device)
        for layer in decoder_layers(model):
            spreader.bring(layer)
            fully_shard(layer, **settings)
        spreader.bring(model)
        self.whole = Whole(model)
        fully_shard(self.whole, **settings | {"reshard_after_forward": False})

    def place_teacher(self, model: nn.Module) -> None:
        """Brings a frozen model to this process's device, whole or its part of it, in its own dtype."""
        if model in self._placed:
            return
        self._placed.add(model)
        mesh = self.device_mesh["data_parallel"]
        spreader = Spreader(model, self.root_device)
        for layer in decoder_layers(model):
            spreader.bring(layer)
            if self.shard_teacher:
                fully_shard(layer, mesh=mesh)
        spreader.bring(model)
        if self.shard_teacher:
            fully_shard(model, mesh=mesh, reshard_after_forward=False)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(model, *args)` while the weights outside the layers are gathered."""
        assert self.whole is not None
        result = self.whole(function, *args)
        if not torch.is_grad_enabled():  # no backward will come, which gives the gathered weights back
            for module in self.whole.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return result

    def keep_layers_gathered(self, keep: bool) -> None:
        """Whether layers keep their weights from forward to backward, whatever `reshard_after_forward` says.

        They have to where a loss reads what happens inside of them: they gather when a gradient reaches their output.
        """
        assert self.whole is not None
        for layer in decoder_layers(self.whole.model):
            assert isinstance(layer, FSDPModule)
            layer.set_reshard_after_forward(self.reshard_after_forward and not keep)

    def gather_model(self) -> nn.Module | None:
        """The model as it was before it was cut up, with today's weights, on the CPU of the main process."""
        assert self.whole is not None and self._skeleton is not None
        weights = {name: _gathered(weight) for name, weight in self.whole.model.named_parameters()}
        buffers = {name: buffer.cpu() for name, buffer in self.whole.model.named_buffers()}
        if not self.is_global_zero:
            return None
        fill(self._skeleton, weights, buffers)
        return self._skeleton

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, Path(filepath), Everyone())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Tensors of weights and of the optimizer are left `Stored`: each process reads its own parts of them later."""
        checkpoint = read_checkpoint(Path(checkpoint_path), Everyone())
        big = ("state_dict", "optimizer_states")
        return {key: value if key in big else load_whole(value) for key, value in checkpoint.items()}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        stored = checkpoint["state_dict"]
        now = self.lightning_module_state_dict()
        different = sorted(now.keys() ^ stored.keys())
        if different:
            raise ValueError(f"the checkpoint is of another model: {different[0]} is in one of the two only")
        with torch.no_grad():
            for name, weight in now.items():
                local = weight.to_local() if isinstance(weight, DTensor) else weight
                local.copy_(_own_part(stored[name], weight))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer = getattr(optimizer, "_optimizer", optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            like = dict(enumerate(parameters))
            by_parameter = {
                index: over_tensors(values, lambda stored, weight=like[int(index)]: _as(weight, stored))
                for index, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": by_parameter})


class Whole(nn.Module):
    """A model as FSDP's outermost module, in whose call anything may be asked of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.model, *args)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers keeps on one device; where it names none, those of the longest list of modules."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
        layers = max(lists, key=len, default=[])
    return [layer for layer in layers if any(True for _ in layer.parameters())]


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """`clip_grad_norm_`; the norm is that of all processes' parts together."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _gathered(weight: Tensor) -> Tensor:
    """On the CPU of the main process; what the others get is not kept."""
    full = weight.detach().full_tensor() if isinstance(weight, DTensor) else weight.detach()
    return full.cpu() if not dist.is_initialized() or dist.get_rank() == 0 else torch.empty(0)


def _own_part(stored: Stored, like: Tensor) -> Tensor:
    """What this process holds of a tensor that is placed as `like` is; torch.chunk's parts, as FSDP has them."""
    if not isinstance(like, DTensor) or not isinstance(like.placements[0], Shard):
        return stored.whole()
    dim = like.placements[0].dim
    rows, processes = like.shape[dim], like.device_mesh.size()
    each = -(-rows // processes)
    start = min(like.device_mesh.get_local_rank() * each, rows)
    return stored.part(dim, start, min(start + each, rows))


def _as(weight: Tensor, stored: Stored) -> Tensor:
    """A tensor of an optimizer's state: placed as its weight where it has a value for each weight, whole else."""
    if not isinstance(weight, DTensor) or stored.shape() != tuple(weight.shape):
        return stored.whole()
    local = _own_part(stored, weight).to(weight.device)
    return DTensor.from_local(
        local, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )
