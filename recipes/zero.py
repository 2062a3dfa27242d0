"""DeepSpeed's ZeRO 1 and 2: all weights on every process, parts of gradients and optimizer state (arXiv 1910.02054).

DeepSpeed's engine steps and clips by itself, and pickles what it saves. Here it is told where a window ends, asked for
the gradient's norm, and its state goes into the same checkpoints as every other strategy's: whole fp32 tensors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from recipes.checkpoint_files import in_all, read_checkpoint, write_checkpoint
from recipes.checkpoint_state import load_whole
from recipes.sharded import Everyone

STAGES = (1, 2)
MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero(DeepSpeedStrategy):
    """ZeRO 1 or 2.

    Args:
        stage: 1 shares out the optimizer's state, 2 the gradients too.
        gradient_clip_norm: of a step's gradient; None does not clip.
        process_group_backend: of torch.distributed.

    Raises:
        ValueError: for stage 3, and where DeepSpeed is not installed.
    """

    lightning_restore_optimizer = True  # type: ignore[assignment]  # by load_optimizer_state_dict, as everywhere

    def __init__(self, *, stage: int, gradient_clip_norm: float | None, process_group_backend: str) -> None:
        if stage not in STAGES:
            raise ValueError(
                f"trainer.stage is {stage!r}, allowed are 1 and 2: losses read weights outside of the layers, which "
                "ZeRO 3 does not gather there; trainer=fsdp shares out the weights too"
            )
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError('trainer.strategy=deepspeed needs DeepSpeed: pip install "attnzoo[deepspeed]"')
        config = {
            "zero_optimization": {"stage": stage, "contiguous_gradients": True, "overlap_comm": False},
            "zero_allow_untested_optimizer": True,  # that of torch
            "train_micro_batch_size_per_gpu": 1,  # for its own statistics alone
            "gradient_clipping": gradient_clip_norm or 0.0,
        }
        super().__init__(config=config, process_group_backend=process_group_backend)
        self._parameters: list[nn.Parameter] = []  # in the optimizer's order

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()  # without Lightning's refusal of a CPU

    def setup_distributed(self) -> None:
        super(DeepSpeedStrategy, self).setup_distributed()
        self._init_deepspeed_distributed()  # finds the processes connected

    def setup(self, trainer: Trainer) -> None:
        stages = trainer.lightning_module.stages
        if len(stages) > 1:
            raise ValueError("trainer.strategy=deepspeed runs one stage, as its optimizer cannot begin anew; take fsdp")
        super().setup(trainer)

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
        import deepspeed

        if type(optimizer) is not torch.optim.AdamW:  # it gets flat parts of several weights
            raise ValueError("trainer.strategy=deepspeed runs optimizer.method=adamw alone; take that, or trainer=ddp")
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
        engine, zero, _, _ = deepspeed.initialize(
            config=self.config,
            model=model,
            model_parameters=self._parameters,
            optimizer=optimizer,
            dist_init_required=False,
        )
        for module, name, buffer in buffers:  # which the engine rounds to bf16 with the weights: rotary frequencies
            if buffer is not None:
                module._buffers[name] = buffer.to(self.root_device)
        return engine, zero

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Inside it a backward is not the last one of its window."""
        self.model.set_gradient_accumulation_boundary(False)  # type: ignore[union-attr, operator]
        try:
            yield
        finally:
            self.model.set_gradient_accumulation_boundary(True)  # type: ignore[union-attr, operator]

    def gradient_norm(self) -> Tensor:
        """Of the window whose backward passes are done; the engine clips by it when it steps."""
        norm = self._zero.scaled_global_norm()
        norm = torch.as_tensor(norm, dtype=torch.float32, device=self.root_device)
        return torch.where(norm < 0, torch.nan, norm)  # -1 stands for a norm that is not finite

    def gather_model(self) -> nn.Module:
        """The model with its fp32 weights, in place; call it in all processes."""
        assert self.lightning_module is not None
        for weight in self.lightning_module.model.parameters():
            weight.data = self._full(weight)
        return self.lightning_module.model

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Weights in fp32, as the optimizer holds them; call it in all processes."""
        assert self.lightning_module is not None
        return {name: self._full(weight) for name, weight in self.lightning_module.state_dict(keep_vars=True).items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As AdamW has it without DeepSpeed; call it in all processes."""
        inner = self._zero.optimizer
        step = inner.state[self._zero.single_partition_of_fp32_groups[0]]["step"]
        state = {
            index: {"step": step.clone(), **{key: self._full(weight, key) for key in MOMENTS}}
            for index, weight in enumerate(self._parameters)
        }
        groups, first = [], 0
        for group, weights in zip(self._zero.param_groups, self._zero.bit16_groups, strict=True):
            settings = {key: value for key, value in group.items() if key != "params"}
            groups.append({**settings, "params": list(range(first, first + len(weights)))})
            first += len(weights)
        return {"state": state, "param_groups": groups}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        in_all(Everyone(), lambda: write_checkpoint(checkpoint, Path(filepath)) if self.is_global_zero else None)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return load_whole(read_checkpoint(Path(checkpoint_path), Everyone()))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        with torch.no_grad():
            for name, weight in self.lightning_module.state_dict(keep_vars=True).items():
                value = checkpoint["state_dict"][name]
                weight.data.copy_(value)
                self._keep_part(weight, value)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        [saved] = checkpoint["optimizer_states"]
        for flat in self._zero.single_partition_of_fp32_groups:
            state = {key: torch.zeros_like(flat) for key in MOMENTS}
            step = saved["state"][0]["step"].to(flat.device, copy=True)  # where the fused AdamW wants it
            self._zero.optimizer.state[flat] = {"step": step, **state}
        for index, weight in enumerate(self._parameters):
            for key in MOMENTS:
                self._keep_part(weight, saved["state"][index][key], key)

    def _full(self, weight: Tensor, key: str | None = None) -> Tensor:
        """A weight in fp32, or what AdamW keeps of it, put together from all processes' parts."""
        if not hasattr(weight, "_hp_mapping"):  # frozen, and whole everywhere
            return weight.detach().float()
        full = torch.zeros(weight.numel(), dtype=torch.float32, device=self.root_device)
        part = self._part(weight, key)
        if part is not None:
            own, start = part
            full[start : start + len(own)] = own
        dist.all_reduce(full)
        return full.view_as(weight)

    def _keep_part(self, weight: Tensor, value: Tensor, key: str | None = None) -> None:
        part = self._part(weight, key)
        if part is not None:
            own, start = part
            own.copy_(value.flatten()[start : start + len(own)])

    def _part(self, weight: Tensor, key: str | None) -> tuple[Tensor, int] | None:
        """What this process holds, a view, and where in the flattened weight that begins; None where it has nothing."""
        place = getattr(weight, "_hp_mapping", None)
        if place is None:
            return None
        groups = zip(self._zero.bit16_groups, self._zero.single_partition_of_fp32_groups, strict=True)
        flat = next(flat for weights, flat in groups if any(weight is other for other in weights))
        held = flat.detach() if key is None else self._zero.optimizer.state[flat][key]
        own, whole = place.hp_fragment_address, place.lp_fragment_address
        return held[own.start : own.start + own.numel], whole.start

    @property
    def _zero(self) -> Any:
        return self.model.optimizer  # type: ignore[union-attr]
