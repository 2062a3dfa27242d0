"""Attention as the textbook writes it, scores and all: the truth that other backends are held to.

Softmax(scale * Q K^T) V (arXiv 1706.03762) with grouped heads (2305.13245), soft-capped scores (Gemma 2, 2408.00118),
an additive bias, ALiBi's penalty of distance (2108.12409) and attention sinks, one learned logit a head that takes
probability and gives no value (2309.17453, gpt-oss).
Quadratic in memory, differentiable by autograd, right in fp64; it runs only when asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.softmax.common import Call, accumulation_dtype, distances, visibility


def reasons(call: Call) -> list[str]:
    """Why this backend cannot run the call: never."""
    return []


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    """Output `[B, Hq, Sq, Dv]` in the inputs' dtype and logsumexp `[B, Hq, Sq]`."""
    batch, q_heads, q_len, _ = call.q.shape
    k_heads, k_len = call.k.shape[1:3]
    shape = (batch, k_heads, call.group, q_len, k_len)
    visible = visibility(call)
    if call.bias is not None:
        visible = visible & (call.bias > -torch.inf)
    visible = visible.expand(batch, q_heads, q_len, k_len).reshape(shape)
    sees = visible.any(-1, keepdim=True)  # [B, Hk, G, Sq, 1]
    seen = visible.any(2).any(2)[..., None]  # [B, Hk, Sk, 1]

    # Whatever stands where nobody looks, NaN included, must not reach a sum, forward or backward.
    dtype = accumulation_dtype(call.q.dtype)
    q = call.q.to(dtype).unflatten(1, (k_heads, call.group)).masked_fill(~sees, 0)
    k = call.k.to(dtype).masked_fill(~seen, 0)
    v = call.v.to(dtype).masked_fill(~seen, 0)

    scores = torch.einsum("bhgqd,bhkd->bhgqk", q, k) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.bias is not None:
        scores = scores + call.bias.to(dtype).expand(batch, q_heads, q_len, k_len).reshape(shape)
    if call.alibi_slopes is not None:
        slopes = call.alibi_slopes.to(dtype).reshape(-1, k_heads, call.group, 1, 1)
        scores = scores - slopes * distances(call)
    scores = scores.masked_fill(~visible, -torch.inf)
    columns = scores
    if call.sinks is not None:
        sink = call.sinks.to(dtype).reshape(1, k_heads, call.group, 1, 1).expand(*shape[:-1], 1)
        columns = torch.cat([scores, sink], dim=-1)
    lse = torch.logsumexp(columns.masked_fill(~sees, 0), dim=-1, keepdim=True)
    p = torch.exp(scores - lse).masked_fill(~visible, 0)
    p = torch.dropout(p, call.dropout_p, train=call.dropout_p > 0)
    out = torch.einsum("bhgqk,bhkd->bhgqd", p, v)
    lse = lse.masked_fill(~sees, -torch.inf).squeeze(-1)
    return out.flatten(1, 2).to(call.q.dtype), lse.flatten(1, 2)
