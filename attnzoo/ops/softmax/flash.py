"""PyTorch's FlashAttention-2 kernel (arXiv 2307.08691), called as the operator that it is.

`scaled_dot_product_attention` hides what the kernel can do: sliding windows, causal masks aligned bottom right when
queries and keys differ in number, and the logsumexp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.masks import Full
from attnzoo.ops.launching import capability
from attnzoo.ops.softmax.common import Call, extra_reasons, globally_deterministic, inner_contiguous, window

_forward = torch.ops.aten._flash_attention_forward.default


def reasons(call: Call) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    out = extra_reasons(call, dropout=True)
    q_len, k_len, dim = call.q.shape[2], call.k.shape[2], call.q.shape[-1]
    if call.packed:
        out.append("runs packed sequences under the name sdpa")
    if dim % 8 or dim > 256 or call.v.shape[-1] != dim:
        out.append("wants values as wide as keys, a multiple of 8 up to 256")
    if not isinstance(call.mask, Full) and q_len > k_len:
        out.append("leaves queries before the first key undefined")
    if call.return_lse and call.trains:
        out.append("has no gradient of the logsumexp")
    if call.deterministic and call.trains and not globally_deterministic():
        out.append("is deterministic only under torch.use_deterministic_algorithms(True)")
    if call.q.device.type == "cuda" and capability(call.q.device.index) < (8, 0):
        out.append("needs compute capability 8.0")
    return out


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Output `[B, Hq, Sq, D]` and logsumexp `[B, Hq, Sq]`, the latter without a gradient."""
    q, k, v = (t.transpose(1, 2) for t in inner_contiguous(call.q, call.k, call.v))
    q_len, k_len = call.q.shape[2], call.k.shape[2]
    left, right = window(call.mask)
    causal = right == 0 and left < 0
    sides = {} if left < 0 else {"window_size_left": left, "window_size_right": right}
    out, lse, *_ = _forward(q, k, v, None, None, q_len, k_len, call.dropout_p, causal, False, scale=call.scale, **sides)
    return out.transpose(1, 2), lse
