"""The backends by name, and the first of them that can run a call."""

from __future__ import annotations

from types import ModuleType

from attnzoo.ops.softmax import choice, cudnn, fa3, flash, flash4, reference, sdpa, tiled
from attnzoo.ops.softmax.common import Call
from attnzoo.ops.softmax.triton import backend as triton

BACKENDS: dict[str, ModuleType] = {
    "sdpa": sdpa,
    "sdpa-flash": flash,
    "sdpa-cudnn": cudnn,
    "flash-attn-4": flash4,
    "fa3-fwd": fa3,
    "triton": triton,
    "tiled": tiled,
    "reference": reference,
}


def choose(call: Call, backend: str) -> ModuleType:
    """The backend of that name, or for "auto" the first in the order of `choice`; ValueError with all reasons."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {list(BACKENDS)}, got {backend!r}")
    refusals = []
    for name in choice.order(call)[0] if backend == "auto" else (backend,):
        why = BACKENDS[name].reasons(call)
        if not why:
            return BACKENDS[name]
        refusals.append(f"{name}: {'; '.join(why)}")
    raise ValueError("no backend can run this call\n" + "\n".join(refusals))
