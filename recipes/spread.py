"""A model that one process has loaded, brought to all of them layer by layer; and copies of a model without weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from recipes import parallel
from recipes.heads import adopt_rule, rule_of


class Spreader:
    """Brings the main process's weights and buffers to the others, whose own may be on the meta device.

    Call each method in all processes.

    Args:
        model: the whole one, of the same class everywhere.
        device: where this process computes.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device
        main = parallel.is_main_process()
        adopt_rule(model, parallel.share(rule_of(model) if main else None))
        dtypes = parallel.share([t.dtype for t in _tensors(model)] if main else [])
        self._to_bring = WeakIdKeyDictionary(dict(zip(_tensors(model), dtypes, strict=True)))

    def bring(self, module: nn.Module) -> None:
        """Puts the main process's values into `module`, in place, on the device; what was brought before stays.

        Tensors that the module shares with others of the model stay shared.
        """
        new = {id(t): self._whole(t) for t in _tensors(module) if t in self._to_bring}
        replace_parameters(self.model, lambda p: nn.Parameter(new[id(p)], p.requires_grad) if id(p) in new else p)
        for inner in self.model.modules():
            for name, buffer in inner._buffers.items():
                if id(buffer) in new:
                    inner._buffers[name] = new[id(buffer)]

    def _whole(self, t: Tensor) -> Tensor:
        if parallel.is_main_process():
            full = t.detach().to(self.device).contiguous()
        else:
            full = torch.empty(t.shape, dtype=self._to_bring[t], device=self.device)
        dist.broadcast(full, src=0)
        return full


def without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters are on the meta device, shared where the model shares them."""
    held = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, held)


def fill(skeleton: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Gives a copy `without_weights` its weights, in place; parameters stay shared."""
    new = {id(p): nn.Parameter(weights[name], p.requires_grad) for name, p in skeleton.named_parameters()}
    replace_parameters(skeleton, lambda p: new[id(p)])
    for name, buffer in skeleton.named_buffers():
        buffer.copy_(buffers[name])


def replace_parameters(model: nn.Module, by: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Puts `by(parameter)` in each parameter's place; what is shared stays shared."""
    new: dict[int, nn.Parameter] = {}
    old = list(model.parameters())  # alive until the end, so that no id is given twice
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in new:
                    new[id(parameter)] = by(parameter)
                module._parameters[name] = new[id(parameter)]
    del old


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
