"""Launches that are made again: what a call's form decides is worked out once, and a call only fills in addresses.

Working it out takes as long as a short kernel runs. No Triton here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from attnzoo.ops.launcher import Launcher

Plan = TypeVar("Plan")
_MOST = 4096  # plans; one serves every call of its form, so a program has few


class Plans(Generic[Plan]):
    """What calls of one form share, by that form."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Plan] = {}

    def get(self, form: Hashable, make: Callable[[], Plan]) -> Plan:
        """The plan of this form, made now if it is not there."""
        plan = self._made.get(form)
        if plan is None:
            if len(self._made) >= _MOST:
                self._made.clear()
            plan = self._made[form] = make()
        return plan

    def clear(self) -> None:
        """Forget all."""
        self._made.clear()


class Repeat:
    """One kernel's launch for other tensors of the same form, and other numbers where it is not specialised on them.

    Args:
        launcher: of the kernel.
        grid: programs.
        rest: arguments that are the same at each launch, between the numbers and the constants.
        constants: by name.
        options: num_warps and num_stages.
    """

    def __init__(
        self,
        launcher: Launcher,
        grid: tuple[int, ...],
        rest: Sequence[Any],
        constants: Mapping[str, Any],
        **options: int,
    ) -> None:
        self._launcher, self._grid, self._rest = launcher, grid, rest
        self._constants, self._options = constants, options
        self._run: Callable[..., object] | None = None  # for addresses that are multiples of 16
        self._end: list[Any] = []
        self._device: int | None = None

    def __call__(self, tensors: Sequence[Tensor | None], numbers: Sequence[int] = ()) -> None:
        """Launch on the current stream.

        Args:
            tensors: the kernel's first arguments, the first of them a tensor.
            numbers: the arguments that follow, integers of 32 bits that the kernel is not specialised on.
        """
        addresses: list[int | None] = []
        bits = 0
        for tensor in tensors:
            if tensor is None:
                addresses.append(None)
            else:
                addresses.append(address := tensor.data_ptr())
                bits |= address
        aligned = bits % 16 == 0
        if aligned and self._run is not None and torch.cuda.current_device() == self._device:
            self._run(*addresses, *numbers, *self._end)
            return
        arguments = (*tensors, *numbers, *self._rest)
        if not aligned:
            self._launcher(self._grid, arguments, self._constants, **self._options)
            return
        self._run, values = self._launcher.launched(self._grid, arguments, self._constants, **self._options)
        self._end = [*self._rest, *values]
        self._device = tensors[0].device.index  # type: ignore[union-attr]
