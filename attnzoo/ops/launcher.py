"""Launching a Triton kernel again without Triton's own look-up, which takes as long as a short kernel runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

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
        self.launched(grid, arguments, constants, **options)

    def recorded(
        self,
        recording: Recording,
        grid: tuple[int, ...],
        arguments: Sequence[Any],
        constants: Mapping[str, Any],
        **options: int,
    ) -> None:
        """The same, taken down to be made again."""
        run, values = self.launched(grid, arguments, constants, **options)
        recording.add(run, [*arguments, *values])

    def launched(
        self, grid: tuple[int, ...], arguments: Sequence[Any], constants: Mapping[str, Any], **options: int
    ) -> tuple[Callable[..., object] | None, list[Any]]:
        """Launch; what launches this kernel on this grid, if it was compiled, and the constants that follow."""
        first = arguments[0]
        device = (first if isinstance(first, Tensor) else first.base).device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.launched(grid, arguments, constants, **options)
        kinds = [_kind(argument, free) for argument, free in zip(arguments, self._free, strict=False)]
        names = self._names[len(arguments) :]
        values = [constants[name] for name in names]
        key = (*kinds, *values, *options.values(), device)
        compiled = self._compiled.get(key)
        whole = (*grid, 1, 1)[:3]
        if compiled is None:
            compiled = self.kernel[grid](*arguments, **dict(zip(names, values, strict=True)), **options)
            if compiled is None:  # interpreted kernels are not compiled
                return None, values
            self._compiled[key] = compiled
            return compiled[whole], values
        run = compiled[whole]
        run(*arguments, *values)
        return run, values


@cache
def launcher_of(kernel: Any) -> Launcher:
    """The one launcher of a kernel."""
    return Launcher(kernel)


class Recording:
    """The launches of one call, to be made again for other tensors of the same shapes, strides and dtypes.

    Args:
        tensors: those that change from call to call, or None in their places; addresses are multiples of 16.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self._places = {id(t): n for n, t in enumerate(tensors) if t is not None}
        self._launches: list[_Launch] = []
        self._whole = _aligned(tensors)

    def add(self, run: Callable[..., object] | None, arguments: list[Any]) -> None:
        """Take down a launch; None stands for one that cannot be made again."""
        pointers, tiles = [], []
        for at, argument in enumerate(arguments):
            base = getattr(argument, "base", None)
            held = argument if isinstance(argument, Tensor) else base if isinstance(base, Tensor) else None
            if held is None:
                continue
            self._whole = self._whole and id(held) in self._places
            place = self._places.get(id(held), 0)
            if held is argument:
                pointers.append((at, place))
            else:
                tiles.append((at, place, argument.shape, argument.strides, argument.block_shape))
            arguments[at] = None  # nothing here keeps a tensor alive
        if run is None:
            self._whole = False
        else:
            self._launches.append(_Launch(run, arguments, pointers, tiles))

    def replay(self, tensors: Sequence[Tensor | None]) -> bool:
        """Make all launches for these tensors on the current device and stream; False, and none made, if it cannot, or
        if there are none: what was done instead of them was not taken down."""
        if not (self._whole and self._launches and _aligned(tensors)):
            return False
        for run, template, pointers, tiles in self._launches:
            arguments = template.copy()
            for at, place in pointers:
                arguments[at] = tensors[place]
            for at, place, *described in tiles:
                arguments[at] = _Tiles(tensors[place], *described)
            run(*arguments)
        return True


class _Launch(NamedTuple):
    run: Callable[..., object]
    template: list[Any]
    pointers: list[tuple[int, int]]  # argument, place among the tensors
    tiles: list[tuple[Any, ...]]  # the same, and what a descriptor says


class _Tiles(NamedTuple):
    """What Triton reads of a tensor descriptor at a launch."""

    base: Any
    shape: Sequence[int]
    strides: Sequence[int]
    block_shape: Sequence[int]
    padding: str = "zero"


def _aligned(tensors: Sequence[Tensor | None]) -> bool:
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


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
