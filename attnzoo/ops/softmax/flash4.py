"""FlashAttention-4, the CuTe kernels of the package flash-attn-4, where it is installed.

The package knows autograd but not torch.compile; the two operators here stand around its forward and its backward.
"""

from __future__ import annotations

import functools
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.masks import Full
from attnzoo.ops.launching import capability
from attnzoo.ops.softmax.common import Call, extra_reasons, inner_contiguous, window
from attnzoo.ops.softmax.tails import clear, cleared


def reasons(call: Call) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    if not installed():
        return ["the package flash-attn-4 is not installed"]
    out = extra_reasons(call, softcap=True, sinks=True)
    dim, v_dim = call.q.shape[-1], call.v.shape[-1]
    if call.q.device.type == "cuda":
        major = capability(call.q.device.index)[0]
        if major not in (9, 10):
            out.append("needs compute capability 9.0 or 10.0")
        widest = 256 if major == 9 else 128
        if dim % 8 or v_dim % 8 or (max(dim, v_dim) > widest and (dim, v_dim) != (192, 128)):
            out.append(f"wants head_dims that are multiples of 8 up to {widest}")
    if call.sinks is not None and call.sinks.dtype == torch.float64:
        out.append("has no fp64 sinks")
    if call.sinks is not None and call.return_lse:
        out.append("counts the sink in the logsumexp of queries that see no key")
    if not call.packed and not isinstance(call.mask, Full) and call.q.shape[2] > call.k.shape[2]:
        out.append("leaves queries before the first key undefined")
    return out or [why for why in [refusal()] if why]


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Output `[B, Hq, Sq, Dv]` in the inputs' dtype and logsumexp `[B, Hq, Sq]` in fp32."""
    options = (call.scale, *window(call.mask), call.softcap or 0.0, call.deterministic)
    if not call.packed:
        q, k, v = (t.transpose(1, 2) for t in inner_contiguous(call.q, call.k, call.v))
        out, lse = flash4_forward(q, k, v, call.sinks, None, None, *options)
        return out.transpose(1, 2), lse
    assert call.cu_seqlens_q is not None and call.cu_seqlens_k is not None
    q, k, v = (t[0].transpose(0, 1) for t in inner_contiguous(call.q, call.k, call.v))
    cu_q, cu_k = call.cu_seqlens_q.int(), call.cu_seqlens_k.int()
    out, lse = flash4_forward(q, k, v, call.sinks, cu_q, cu_k, *options)
    return out.transpose(0, 1)[None], lse[None]


@torch.compiler.assume_constant_result
def installed() -> bool:
    """Whether the package is there; it is not imported for that. Older packages share its folder, not its kernels."""
    return _is_there()


@torch.compiler.assume_constant_result
def refusal() -> str:
    """Why the package does not import, or nothing."""
    return _library()[1]


@functools.cache
def _is_there() -> bool:
    spec = find_spec("flash_attn")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return any((Path(folder) / "cute" / "interface.py").is_file() for folder in folders)


@functools.cache
def _library() -> tuple[Any, str]:
    try:
        from flash_attn.cute import interface  # type: ignore[import-not-found]
    except Exception as error:  # a broken installation of others must not break the choice
        return None, f"does not import: {type(error).__name__}: {error}".splitlines()[0]
    return interface, ""


@torch.library.custom_op("attnzoo::flash4_forward", mutates_args=(), device_types="cuda")
def flash4_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of `[B, S, H, D]`, or packed `[T, H, D]`; `left` and `right` as `common.window` has them.

    Rows of packed documents past the last may hold anything, and come out as 0 and -inf.
    """
    if cu_q is not None and cu_k is not None:
        v = _without_tail(v, cu_k)  # scores of such keys are overwritten, but NaN times a weight of 0 is NaN
    out, lse, *_ = _library()[0]._flash_attn_fwd(
        q, k, v, learnable_sink=sinks, return_lse=True, **_options(q, k, cu_q, cu_k, scale, left, right, softcap)
    )
    if cu_q is not None:
        clear(out.transpose(0, 1)[None], cu_q)
        clear(lse[None], cu_q, -math.inf)
    return out, lse


@torch.library.custom_op("attnzoo::flash4_backward", mutates_args=(), device_types="cuda")
def flash4_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the sinks (empty where there are none)."""
    if cu_q is not None and cu_k is not None:
        q, d_out = _without_tail(q, cu_q), _without_tail(d_out, cu_q)
        k, v = _without_tail(k, cu_k), _without_tail(v, cu_k)
        d_lse = None if d_lse is None else cleared(d_lse[None], cu_q)[0]
    options = _options(q, k, cu_q, cu_k, scale, left, right, softcap)
    d_q, d_k, d_v = (t.new_empty(t.shape) for t in (q, k, v))  # theirs would have the inputs' strides
    options |= {"dq": d_q, "dk": d_k, "dv": d_v, "deterministic": deterministic}
    *_, last = _library()[0]._flash_attn_bwd(q, k, v, out, d_out, lse, dlse=d_lse, learnable_sink=sinks, **options)
    if cu_q is not None and cu_k is not None:
        for t, boundaries in ((d_q, cu_q), (d_k, cu_k), (d_v, cu_k)):
            clear(t.transpose(0, 1)[None], boundaries)
    d_sinks = [] if sinks is None else [last]
    return d_q, d_k, d_v, d_sinks[0] if d_sinks else q.new_empty(0)


def _without_tail(t: Tensor, boundaries: Tensor) -> Tensor:
    """A copy of `[T, H, D]` with zeros past the last boundary."""
    return cleared(t.transpose(0, 1)[None], boundaries)[0].transpose(0, 1)


def _options(
    q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, scale: float, left: int, right: int, softcap: float
) -> dict[str, Any]:
    causal = (left, right) == (-1, 0)
    out: dict[str, Any] = {"softmax_scale": scale, "causal": causal, "softcap": softcap}
    if not causal and (left, right) != (-1, -1):
        out |= {"window_size_left": left, "window_size_right": right}
    if cu_q is not None:
        out |= {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": len(q), "max_seqlen_k": len(k)}
    return out


@flash4_forward.register_fake
def _(q, k, v, sinks, cu_q, *rest):  # type: ignore[no-untyped-def]
    heads_by_rows = (q.shape[1], q.shape[0]) if cu_q is not None else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(heads_by_rows, dtype=torch.float32)


@flash4_backward.register_fake
def _(d_out, d_lse, q, k, v, out, lse, sinks, *rest):  # type: ignore[no-untyped-def]
    d_sinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return *(t.new_empty(t.shape) for t in (q, k, v)), d_sinks


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:6])
    ctx.rest = inputs[6:]


def _backward(ctx, d_out, d_lse):  # type: ignore[no-untyped-def]
    out, sinks = ctx.saved_tensors[3], ctx.saved_tensors[5]
    d_out = torch.zeros_like(out) if d_out is None else d_out
    d_q, d_k, d_v, d_sinks = flash4_backward(d_out, d_lse, *ctx.saved_tensors, *ctx.rest)
    return d_q, d_k, d_v, None if sinks is None else d_sinks, *([None] * 7)


flash4_forward.register_autograd(_backward, setup_context=_save)
