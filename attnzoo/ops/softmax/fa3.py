"""FlashAttention-3's forward (arXiv 2407.08608) from the package fa3-fwd, where it is installed: no gradients."""

from __future__ import annotations

import functools
import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from attnzoo.masks import SlidingWindow
from attnzoo.ops.launching import capability
from attnzoo.ops.softmax.common import Call, extra_reasons, inner_contiguous, window
from attnzoo.ops.softmax.tails import clear, cleared


def reasons(call: Call) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    if not installed():
        return ["the package fa3-fwd is not installed"]
    out = extra_reasons(call, softcap=True)
    dim, v_dim = call.q.shape[-1], call.v.shape[-1]
    if call.trains:
        out.append("has no backward")
    if call.q.dtype == torch.float16:
        out.append("is built without fp16")
    if isinstance(call.mask, SlidingWindow):
        out.append("is built without sliding windows")
    if dim % 8 or dim > 256 or v_dim != dim:
        out.append("wants values as wide as keys, a multiple of 8 up to 256")
    if call.q.device.type == "cuda" and capability(call.q.device.index)[0] != 9:
        out.append("needs compute capability 9.0")
    return out or [why for why in [refusal()] if why]


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Output `[B, Hq, Sq, D]` and logsumexp `[B, Hq, Sq]`."""
    causal = window(call.mask) == (-1, 0)
    if not call.packed:
        q, k, v = (t.transpose(1, 2) for t in inner_contiguous(call.q, call.k, call.v))
        out, lse = _forward(q, k, v, None, None, call.scale, causal, call.softcap or 0.0)
        return out.transpose(1, 2), lse
    assert call.cu_seqlens_q is not None and call.cu_seqlens_k is not None
    cu_q, cu_k = call.cu_seqlens_q.int(), call.cu_seqlens_k.int()
    # Scores of keys past the last are overwritten, but NaN of values times a weight of 0 is NaN.
    q, k, v = inner_contiguous(call.q, call.k, call.v)
    q, k, v = (t[0].transpose(0, 1) for t in (q, k, cleared(v, cu_k)))
    out, lse = _forward(q, k, v, cu_q, cu_k, call.scale, causal, call.softcap or 0.0)
    return clear(out.transpose(0, 1)[None], cu_q), clear(lse[None], cu_q, -math.inf)


@torch.compiler.assume_constant_result
def installed() -> bool:
    """Whether the package is there; it is not imported for that."""
    return _spec() is not None


@torch.compiler.assume_constant_result
def refusal() -> str:
    """Why the package does not import, or nothing."""
    return _library()[1]


@functools.cache
def _spec() -> object:
    return find_spec("fa3_fwd_interface")


@functools.cache
def _library() -> tuple[Any, str]:
    try:
        import fa3_fwd_interface  # type: ignore[import-not-found]
    except Exception as error:  # a broken installation of others must not break the choice
        return None, f"does not import: {type(error).__name__}: {error}".splitlines()[0]
    return fa3_fwd_interface, ""


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    scale: float,
    causal: bool,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    q_longest, k_longest = (q.shape[0], k.shape[0]) if cu_q is not None else (None, None)
    compiling = torch.compiler.is_compiling()
    splits = 1 if compiling or q.shape[-3] > 256 else 0  # of the keys; 0: as many as fill the GPU
    # Its Python operator can be traced; the one beneath costs less a call.
    forward = torch.ops.fa3_fwd._flash_attn_forward if compiling else torch.ops.fa3_fwd.fwd
    before = (q, k, v, None, None, None, None, cu_q, cu_k, None, None, None, q_longest, k_longest)
    after = (scale, causal, -1, -1, 0, softcap, True, None, splits, None, 0)
    return forward(*before, *([None] * 9), *after)[:2]
