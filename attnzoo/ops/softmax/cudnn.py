"""cuDNN's fused attention, through the operator that PyTorch wraps around it.

PyTorch itself takes it only where its own table of devices says so; here the measured one decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.masks import Causal, Full
from attnzoo.ops.launching import capability
from attnzoo.ops.softmax.common import Call, extra_reasons, inner_contiguous

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention.default


def reasons(call: Call) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    out = extra_reasons(call)
    q_len, k_len, dim = call.q.shape[2], call.k.shape[2], call.q.shape[-1]
    if call.packed:
        out.append("has no packed sequences here")
    if dim % 8 or dim > 128 or call.v.shape[-1] != dim:
        out.append("wants values as wide as keys, a multiple of 8 up to 128")
    if not isinstance(call.mask, Full | Causal):
        out.append("has full and causal masks only")
    if isinstance(call.mask, Causal) and q_len != k_len:
        out.append("aligns causal masks top left when queries and keys differ in number")
    if k_len < 2:
        out.append("wants at least two keys")
    if call.return_lse and call.trains:
        out.append("has no gradient of the logsumexp")
    if call.deterministic and call.trains:
        out.append("is not deterministic")
    if call.q.device.type == "cuda" and capability(call.q.device.index) < (9, 0):
        out.append("needs compute capability 9.0")
    if call.q.device.type == "cuda" and not available():
        out.append("needs a PyTorch with cuDNN")
    return out


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether this PyTorch was built with cuDNN."""
    return torch.backends.cudnn.is_available()


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    """Output `[B, Hq, Sq, D]` and, where it was asked for, the logsumexp `[B, Hq, Sq]` without a gradient."""
    q, k, v = inner_contiguous(call.q, call.k, call.v)
    causal = isinstance(call.mask, Causal)
    out, lse, *_ = _forward(q, k, v, None, call.return_lse or call.trains, 0.0, causal, False, scale=call.scale)
    return out, lse.reshape(out.shape[:3]) if call.return_lse else None
