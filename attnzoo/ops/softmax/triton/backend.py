"""The fused kernels as a backend: what they can run, and the way from a call to the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.launching import triton_reasons
from attnzoo.ops.softmax.common import Call
from attnzoo.ops.softmax.triton import patterns

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def reasons(call: Call) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    out = triton_reasons(call.q.device)
    if call.q.dtype not in _DTYPES:
        out.append(f"runs fp16, bf16 and fp32, not {str(call.q.dtype).removeprefix('torch.')}")
    if max(call.q.shape[-1], call.v.shape[-1]) > 256 and call.trains:
        out.append("has a backward for head_dim up to 256 only")
    if call.q.shape[-1] > 1024 or call.v.shape[-1] > 512:
        out.append("takes queries up to 1024 and values up to 512 wide")
    if not isinstance(call.mask, Tensor):
        out += patterns.reasons(call.mask)
    return out


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Output `[B, Hq, Sq, Dv]` in the inputs' dtype and logsumexp `[B, Hq, Sq]` in fp32."""
    from attnzoo.ops.softmax.triton.op import attend

    dense, text = (call.mask, "") if isinstance(call.mask, Tensor) else (None, call.mask.text)
    seed = torch.randint(1 << 62, (), device=call.q.device) if call.dropout_p > 0 else None
    return attend(
        call.q,
        call.k,
        call.v,
        call.sinks,
        call.bias,
        call.alibi_slopes,
        dense,
        call.key_lengths,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        seed,
        text,
        call.scale,
        call.softcap or 0.0,
        call.dropout_p,
    )
