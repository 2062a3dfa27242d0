"""Operators without the operator around them, where nobody traces: it costs as much as a short kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnzoo.ops.launching import is_plain

Outputs = TypeVar("Outputs", bound=tuple[Tensor, ...])


def with_shortcut(
    operator: Callable[..., Outputs],
    forward: Callable[..., Outputs],
    save: Callable[..., None],
    backward: Callable[..., tuple[Any, ...]],
) -> Callable[..., Outputs]:
    """`operator`, or what it does, with its gradient, for tensors that are nothing but tensors.

    Args:
        operator: takes the same arguments as `forward`, tensors or None first.
        forward: what the operator runs.
        save, backward: what its gradient was registered with.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
            return backward(ctx, *gradients)

    def run(*inputs: Any) -> Outputs:
        if not is_plain(inputs[0]):
            return operator(*inputs)
        wanted = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)
        return Eager.apply(*inputs) if wanted else forward(*inputs)

    return run
