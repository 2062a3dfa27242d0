"""What the linear kernels cannot run, and why."""

from __future__ import annotations

import torch

from attnzoo.ops.launching import triton_reasons
from attnzoo.ops.linear.common import Call

LARGEST = 256  # features of a key, and values: what a program's registers hold
MOST_TOKENS = 16  # of a step


def reasons(call: Call) -> list[str]:
    """Why the kernels cannot run the call; empty if they can."""
    out = triton_reasons(call.q.device)
    if torch.float64 in (call.q.dtype, call.v.dtype):
        out.append("has no fp64")
    for name, size in (("features", call.q.shape[3]), ("values", call.v.shape[3])):
        if not 1 <= size <= LARGEST:
            out.append(f"takes {name} of 1 to {LARGEST}, here {size}")
    if 0 in call.q.shape[:2] or call.sequences == 0:
        out.append("needs a sequence and a head")
    if call.q.shape[1] > 65535:
        out.append("takes 65535 heads at most")
    return out


def step_reasons(call: Call) -> list[str]:
    """Why the kernel of a step cannot run the call, which is causal; empty if it can."""
    out = reasons(call)
    if call.cu_seqlens is not None:
        out.append("steps no packed documents")
    if not 1 <= call.q.shape[2] <= MOST_TOKENS:
        out.append(f"steps 1 to {MOST_TOKENS} tokens, here {call.q.shape[2]}")
    if call.q.shape[0] > 65535:
        out.append("steps 65535 rows at most")
    tensors = (call.q, call.k, call.v, *(call.initial or ()))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out.append("has no gradient")
    return out
