"""Neighbouring projections of one input as a single matmul: queries, keys and values; gate and up.

A matmul of three weights side by side reads its input once instead of three times, and makes the input's gradient in
one go. The weights stay parameters of their own, so that nothing else of a model or its checkpoints changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def merge_projections(model: nn.Module) -> int:
    """Let modules of `model` that have such projections run them as one, in place; how many modules that are.

    Only plain linear layers are merged, so adapters and quantised layers stay as they are. A module has to call its
    projections one after the other on the same tensor, as every family of transformers does; one that does not gets
    what it would have got, computed each by itself. Meant for torch.compile, which lays the weights side by side as it
    casts them.
    """
    merged = 0
    for module in model.modules():
        for names in TOGETHER:
            layers = [getattr(module, name, None) for name in names]
            if all(type(layer) is nn.Linear for layer in layers) and _alike(layers):  # type: ignore[arg-type]
                _merge(layers)  # type: ignore[arg-type]
                merged += 1
    return merged


class Merged(nn.Linear):
    """A linear layer that runs with its neighbours. Made of a plain one by `merge_projections`, never from scratch."""

    neighbours: Neighbours
    place: int

    def forward(self, x: Tensor) -> Tensor:
        return self.neighbours.output(self.place, x)


class Neighbours:
    """Linear layers of one input, and what the first computed for those after it: nothing, between a module's calls."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = tuple(layers)
        self.input: Tensor | None = None
        self.outputs: tuple[Tensor, ...] = ()

    def output(self, place: int, x: Tensor) -> Tensor:
        if place == 0:
            weight = torch.cat([layer.weight for layer in self.layers])
            bias = None if self.layers[0].bias is None else torch.cat([layer.bias for layer in self.layers])
            widths = [layer.out_features for layer in self.layers]
            own, *others = F.linear(x, weight, bias).split(widths, dim=-1)
            self.input, self.outputs = x, tuple(others)
            return own
        if self.input is not x or len(self.outputs) != len(self.layers) - place:
            return F.linear(x, self.layers[place].weight, self.layers[place].bias)
        own, self.outputs = self.outputs[0], self.outputs[1:]
        if not self.outputs:
            self.input = None
        return own


def _merge(layers: Sequence[nn.Linear]) -> None:
    neighbours = Neighbours(layers)
    for place, layer in enumerate(layers):
        layer.__class__ = Merged  # not a forward of its own, for which torch.compile would compile each layer anew
        layer.neighbours, layer.place = neighbours, place  # type: ignore[assignment]


def _alike(layers: Sequence[nn.Linear]) -> bool:
    """Of one width, with or without biases, and trained or not together, so that no gradient is made for nothing."""

    def kind(layer: nn.Linear) -> tuple[Any, ...]:
        return layer.in_features, layer.bias is None, layer.weight.dtype, layer.weight.requires_grad

    return len({kind(layer) for layer in layers}) == 1
