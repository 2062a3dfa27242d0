"""Launching a Triton kernel again without Triton's own look-up, which takes as long as a short kernel runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Launcher:
    """A kernel and what it has been compiled to.

    What a compiled kernel may depend on is its key: types and alignment of tensors and descriptors, what of an integer
    Triton specialises on, constants, options and the device.

    Args:
        kernel: a `triton.JITFunction` whose constants stand after its other arguments.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self._names = list(kernel.arg_names)
        free = set(getattr(kernel, "do_not_specialize", None) or ())
        self._free = [name in free for name in self._names]

    def __call__(
        self, grid: tuple[int, ...], arguments: Sequence[Any], constants: Mapping[str, Any], **options: int
    ) -> None:
        """Launch on the current stream of the device of the first argument, a tensor or a descriptor of one.

        Args:
            grid: programs, one to three numbers.
            arguments: tensors, numbers, descriptors and None, in the kernel's order.
            constants: by name, at least the constexpr arguments that follow.
            options: num_warps and num_stages.
        """
        first = arguments[0]
        device = (first if isinstance(first, Tensor) else first.base).device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(grid, arguments, constants, **options)
        kinds = [_kind(argument, free) for argument, free in zip(arguments, self._free, strict=False)]
        names = self._names[len(arguments) :]
        values = [constants[name] for name in names]
        key = (*kinds, *values, *options.values(), device)
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self.kernel[grid](*arguments, **dict(zip(names, values, strict=True)), **options)
            if compiled is not None:  # interpreted kernels are not compiled
                self._compiled[key] = compiled
        else:
            compiled[(*grid, 1, 1)[:3]](*arguments, *values)


def _kind(argument: Any, free: bool) -> Any:
    """What a compiled kernel depends on of an argument."""
    kind = type(argument)
    if kind is int:
        if free:
            return -1 if -(2**31) <= argument < 2**31 else -2
        return 1 if argument == 1 else (argument % 16 == 0, -(2**31) <= argument < 2**31)
    if argument is None or kind is float:
        return kind
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument.base.dtype, *argument.block_shape  # a tensor descriptor
