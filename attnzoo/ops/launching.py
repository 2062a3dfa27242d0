"""What every Triton backend asks before it launches: is there Triton, is there a GPU, and how large is it.

This file imports no Triton, so that a machine without it can import every op and read why the kernels do not run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Build(NamedTuple):
    """One specialisation of a kernel that must compile for every supported GPU; a room's `builds.py` lists them."""

    name: str
    kernel: Any  # a triton.JITFunction
    signature: Mapping[str, str]  # run-time arguments and their Triton types, such as {"q": "*bf16", "length": "i32"}
    constants: Mapping[str, Any]  # constexpr arguments
    num_warps: int = 4
    num_stages: int = 2
    least: int = 80  # compute capability, times ten, from which on it exists
    most: int = 1000  # and up to which


Builds = Iterator[Build]

_TRITON = find_spec("triton")  # once and here: torch.compile cannot trace the search


def triton_reasons(device: torch.device) -> list[str]:
    """Why Triton kernels cannot run on tensors of this device; empty if they can."""
    if find_triton() is None:
        return ["needs the triton package"]
    if interpreted():
        return []
    if device.type != "cuda":
        return [f"runs on CUDA, or anywhere under TRITON_INTERPRET=1; tensors are on {device.type}"]
    if capability(device.index) < (8, 0):
        return ["needs compute capability 8.0"]
    return []


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, on the host; decided when they are imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def find_triton() -> object | None:
    """Triton's module spec, or None where it is not installed."""
    return _TRITON


def is_plain(x: Tensor) -> bool:
    """Whether no compiler, transform, subclass or dispatch mode is looking on.

    Then a launch needs no custom operator around it, which costs as much as a short kernel.
    """
    if type(x) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active() and torch._C._len_torch_dispatch_stack() == 0


def capability(index: int | None) -> tuple[int, int]:
    """Compute capability of a CUDA device, the current one for None."""
    if torch.compiler.is_compiling():  # which knows what a device's properties are, and warns of caches
        properties = torch.cuda.get_device_properties(index)
        return properties.major, properties.minor
    return _capability(index)


def can_copy(t: Tensor) -> bool:
    """Whether the copy engine of Hopper GPUs takes `t`, of four dimensions."""
    size = t.element_size()
    strides = [n for n, many in zip(t.stride()[:3], t.shape[:3], strict=True) if many > 1]
    return t.data_ptr() % 16 == 0 and t.stride(3) == 1 and all(n and n * size % 16 == 0 for n in strides)


def used_strides(t: Tensor) -> list[int]:
    """The first three strides for a descriptor of `t`, of four dimensions: that of a dimension of one is never used, so
    that it may be any number, and is one that fits."""
    whole = t.shape[2] * t.shape[3]
    return [n if many > 1 else whole for n, many in zip(t.stride()[:3], t.shape[:3], strict=True)]


@lru_cache(maxsize=64)
def num_multiprocessors(index: int | None) -> int:
    """Streaming multiprocessors of a CUDA device; a few under the interpreter, which runs one after another."""
    return 4 if interpreted() else torch.cuda.get_device_properties(index).multi_processor_count


@lru_cache(maxsize=64)
def _capability(index: int | None) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major, properties.minor
