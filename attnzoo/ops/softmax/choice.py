"""Which backend is asked first: a measured order where this device has one, else a default by kind of device.

`times.json` is written by `attnzoo bench attention --table`: for each class of calls the backends, fastest first. A
call takes the order of the class nearest to its own; nothing is timed while a program runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attnzoo.masks import Causal, Full, SlidingWindow
from attnzoo.ops.launching import capability
from attnzoo.ops.softmax.common import Call

TABLE = Path(__file__).with_name("times.json")
LENGTHS = (256, 1024, 4096, 16384, 65536)

_ON_CPU = ("sdpa", "tiled")  # the kernels of "triton" run there under an interpreter only, to be tested
_ON_HOPPER = ("fa3-fwd", "flash-attn-4", "sdpa-cudnn", "triton", "sdpa-flash", "sdpa", "tiled")
_ON_AMPERE = ("sdpa-flash", "triton", "sdpa", "tiled")
_ELSEWHERE = ("sdpa", "triton", "tiled")


class Class(NamedTuple):
    """What decides which backend is the fastest; written in the table as `text`."""

    trains: bool
    kind: str  # full, causal, window, packed, softcap, sinks, sparse
    dim: int  # 64, 128 or 256: the least that holds keys and values, as far as it does
    length: int  # one of LENGTHS, the nearest to the number of keys
    grouped: bool  # fewer key heads than query heads

    @property
    def text(self) -> str:
        """Such as `training causal d128 s4096 grouped`."""
        heads = "grouped" if self.grouped else "single"
        return f"{'training' if self.trains else 'forward'} {self.kind} d{self.dim} s{self.length} {heads}"


def class_of(call: Call) -> Class:
    """The class of a call; lengths are only compared, so that torch.compile may leave them open."""
    dim = max(call.q.shape[-1], call.v.shape[-1])
    dim = 64 if dim <= 64 else 128 if dim <= 128 else 256
    length = next((n for n in LENGTHS[:-1] if call.k.shape[2] <= 2 * n), LENGTHS[-1])
    return Class(call.trains, kind_of(call), dim, length, call.group > 1)


def kind_of(call: Call) -> str:
    """What of mask and options decides which kernels there are."""
    if call.sinks is not None:
        return "sinks"
    if call.softcap is not None:
        return "softcap"
    if call.packed:
        return "packed"
    for name, mask in (("full", Full), ("causal", Causal), ("window", SlidingWindow)):
        if isinstance(call.mask, mask):
            return name
    return "sparse"


def order(call: Call) -> tuple[tuple[str, ...], str]:
    """The backends to ask, fastest first, and where that order comes from."""
    if call.q.device.type != "cuda":
        return _ON_CPU, f"the default order on {call.q.device.type}"
    index = call.q.device.index
    name = device_name(index)
    if name in _TABLES:
        known, rest = nearest(_TABLES[name], class_of(call))
        if known:
            return merged(known, _default(index)), f"measured on {name}: {rest}"
    return _default(index), f"the default order for {name}"


def merged(measured: Sequence[str], expected: Sequence[str]) -> tuple[str, ...]:
    """The measured order, and in it what only stands in the expected one: before all that this one puts behind it.

    So a package that was not installed for the measurement does not count as slow.
    """
    out = list(measured)
    for at, name in reversed(list(enumerate(expected))):
        if name not in out:
            behind = [out.index(other) for other in expected[at + 1 :] if other in out]
            out.insert(min(behind, default=len(out)), name)
    return tuple(out)


def nearest(table: Mapping[Class, tuple[str, ...]], wanted: Class) -> tuple[tuple[str, ...], str]:
    """The order of the class nearest to `wanted`, and its text; empty if none has its kind and direction."""
    best, least = None, math.inf
    for known in table:
        if known.trains == wanted.trains and known.kind == wanted.kind:
            far = 4 * abs(math.log2(known.dim / wanted.dim)) + abs(math.log2(known.length / wanted.length))
            far += known.grouped != wanted.grouped
            if far < least:
                best, least = known, far
    return ((), "") if best is None else (table[best], best.text)


def read(tables: Mapping[str, Any]) -> dict[str, dict[Class, tuple[str, ...]]]:
    """The content of `times.json` by device name and class."""
    return {
        name: {_class(text): tuple(backends) for text, backends in device["orders"].items()}
        for name, device in tables.items()
    }


@torch.compiler.assume_constant_result
def device_name(index: int | None) -> str:
    """The name of a CUDA device, the current one for None."""
    if index not in _NAMES:
        _NAMES[index] = torch.cuda.get_device_name(index)
    return _NAMES[index]


def _default(index: int | None) -> tuple[str, ...]:
    found = capability(index)
    if found >= (9, 0):
        return _ON_HOPPER
    return _ON_AMPERE if found >= (8, 0) else _ELSEWHERE


def _class(text: str) -> Class:
    direction, kind, dim, length, heads = text.split()
    return Class(direction == "training", kind, int(dim[1:]), int(length[1:]), heads == "grouped")


_NAMES: dict[int | None, str] = {}
_TABLES = read(json.loads(TABLE.read_text(encoding="utf-8"))) if TABLE.exists() else {}
