"""Launching a kernel again without Triton's own look-up, which takes as long as a short kernel runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Launcher:
    """A kernel and what it has been compiled to.

    What a compiled kernel may depend on is its key: types and alignment of tensors, `fixed` integers, constants,
    options and the device.

    Args:
        kernel: a `triton.JITFunction` whose constants stand after its other arguments.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: Sequence[Tensor | None],
        free: Sequence[float],
        fixed: Sequence[int],
        constants: Mapping[str, Any],
        **options: int,
    ) -> None:
        """Launch on the current stream.

        Args:
            grid: programs.
            tensors: the first arguments.
            free: numbers that follow, on which the kernel does not specialise.
            fixed: integers that follow these.
            constants: the last arguments, in the kernel's order.
            options: num_warps and num_stages.
        """
        device = tensors[0].device if tensors[0] is not None else None
        if device is not None and device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(grid, tensors, free, fixed, constants, **options)
        key = (
            *[None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16) for tensor in tensors],
            *fixed,
            *constants.values(),
            *options.values(),
            device,
        )
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self.kernel[grid](*tensors, *free, *fixed, **constants, **options)
            if compiled is not None:  # interpreted kernels are not compiled
                self._compiled[key] = compiled
        else:
            compiled[grid](*tensors, *free, *fixed, *constants.values())
