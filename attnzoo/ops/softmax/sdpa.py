"""PyTorch's own fused kernels, through `scaled_dot_product_attention`, for calls that they take in linear memory.

Where they do not apply, PyTorch falls back to a quadratic one without a word; `reasons` keeps such calls out.
"""

from __future__ import annotations

import inspect
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from attnzoo.masks import Causal, Full, SlidingWindow
from attnzoo.ops.softmax.common import HALF, Call, globally_deterministic, inner_contiguous, window, without_tails

_ASK_FOR_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 groups heads unasked


def reasons(call: Call) -> list[str]:
    """Why this backend cannot run the call; empty if it can."""
    out = []
    if call.softcap is not None:
        out.append("has no softcap")
    if call.sinks is not None:
        out.append("has no sinks")
    if call.bias is not None:
        out += _bias_reasons(call, call.bias)
    if call.alibi_slopes is not None:
        out.append("has no ALiBi")
    if call.return_lse:
        out.append("does not return the logsumexp")
    if call.q.shape[-1] != call.v.shape[-1]:
        out.append("wants values as wide as keys")
    if call.q.device.type not in ("cpu", "cuda"):
        out.append(f"is not known to be linear in memory on {call.q.device.type}")
    if call.q.device.type == "cpu" and call.dropout_p > 0:
        out.append("has no fused dropout on a CPU")
    if call.deterministic and call.trains and call.q.device.type != "cpu" and not globally_deterministic():
        out.append("is deterministic only under torch.use_deterministic_algorithms(True)")
    return out + (_packed_reasons(call) if call.packed else _padded_reasons(call))


def _bias_reasons(call: Call, bias: Tensor) -> list[str]:
    out = []
    wants_gradient = bias.requires_grad and torch.is_grad_enabled()
    if not isinstance(call.mask, Full) or call.key_lengths is not None:
        out.append("cannot join a bias with a mask but by another bias")
    if bias.dtype != call.q.dtype:
        out.append("wants a bias of the inputs' dtype")
    if call.q.device.type == "cpu":
        return out + (["has no fused gradient of a bias on a CPU"] if wants_gradient else [])
    if wants_gradient and bias.shape != (*call.q.shape[:3], call.k.shape[2]):
        out.append("writes the gradient of a bias out for every query, head and batch that share it")
    return out


def _padded_reasons(call: Call) -> list[str]:
    out = []
    q_len, k_len = call.q.shape[2], call.k.shape[2]
    if isinstance(call.mask, Causal):
        if q_len != k_len:
            out.append("aligns causal masks top left when queries and keys differ in number")
        if call.key_lengths is not None:
            out.append("cannot join a causal mask with key_lengths but by a dense mask")
        if call.q.device.type == "cuda" and call.group > 1 and call.q.dtype not in HALF:
            out.append("has no fused grouped causal kernel in fp32")
    elif not isinstance(call.mask, Tensor | Full):
        out.append(f"has no fused {call.mask.pattern!r} mask")
    if call.q.device.type == "cuda" and (call.q.shape[-1] > 256 or call.q.dtype == torch.float64):
        out.append("has no fused kernel for this dtype or head_dim")
    return out


def _packed_reasons(call: Call) -> list[str]:
    out = []
    if call.q.device.type == "cpu":
        assert call.cu_seqlens_q is not None and call.cu_seqlens_k is not None
        if torch.compiler.is_compiling():
            out.append("reads boundaries on the host, which a compiled graph cannot")
        elif not torch.equal(call.cu_seqlens_q, call.cu_seqlens_k):
            out.append("runs packed sequences on a CPU only where queries and keys share their boundaries")
        if not isinstance(call.mask, Full | Causal):
            out.append("runs packed sequences on a CPU with a full or causal mask only")
        return out
    if call.q.dtype not in HALF:
        out.append("runs packed sequences on CUDA in fp16 or bf16 only")
    if not isinstance(call.mask, Full | Causal | SlidingWindow):
        out.append("runs packed sequences with a full, causal or sliding-window mask only")
    if call.dropout_p > 0:
        out.append("has no dropout for packed sequences")
    if call.q.shape[-1] % 8 or call.q.shape[-1] > 256:
        out.append("wants a head_dim that is a multiple of 8 up to 256 for packed sequences")
    return out


def run(call: Call) -> tuple[Tensor, None]:
    """Output `[B, Hq, Sq, D]`; no logsumexp."""
    if call.packed:
        return (_one_by_one(call) if call.q.device.type == "cpu" else _packed(call)), None
    if isinstance(call.mask, Causal):
        # A branch, and not the comparison, since torch.compile may leave the number of heads open.
        gqa: dict[str, Any] = {"enable_gqa": True} if call.group > 1 else {}
        q, k, v = inner_contiguous(call.q, call.k, call.v)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=call.dropout_p, is_causal=True, scale=call.scale, **gqa)
        return out, None
    return _masked(call), None


def _masked(call: Call) -> Tensor:
    """Full, key-padded or densely masked attention, the heads of a group laid out as further queries of one head."""
    batch, q_heads, q_len, dim = call.q.shape
    k_heads, k_len = call.k.shape[1:3]
    k, v = inner_contiguous(call.k, call.v)
    visible: Tensor | None = call.mask if isinstance(call.mask, Tensor) else None  # [1|B, 1|Hq, 1|Sq, Sk]
    if call.key_lengths is not None:
        real = (torch.arange(k_len, device=k.device) < call.key_lengths[:, None])[:, None, None, :]
        visible = real if visible is None else visible & real
    sees = None
    if visible is not None:
        visible = visible.reshape((1,) * (4 - visible.dim()) + visible.shape)
        seen = visible.any(2).any(1)[:, None, :, None].expand(-1, 1, k_len, 1)  # [1|B, 1, Sk, 1]
        k, v = k.masked_fill(~seen, 0), v.masked_fill(~seen, 0)
        # A row without a visible key is shown everything, to keep NaN out of its softmax, and is zeroed afterwards.
        sees = visible.any(-1, keepdim=True)
        visible = _rows_of_groups(visible | ~sees, k_heads, call.group, q_len, k_len)
    added = visible
    if call.bias is not None:
        bias = call.bias.reshape((1,) * (4 - call.bias.dim()) + call.bias.shape)
        sees = (bias > -torch.inf).any(-1, keepdim=True)
        added = _rows_of_groups(bias.masked_fill(~sees, 0), k_heads, call.group, q_len, k_len)
    q = inner_contiguous(call.q)[0].reshape(batch, k_heads, call.group * q_len, dim)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, dropout_p=call.dropout_p, scale=call.scale)
    out = out.reshape(batch, q_heads, q_len, dim)
    return out if sees is None else out.masked_fill(~sees, 0)


def _rows_of_groups(visible: Tensor, k_heads: int, group: int, q_len: int, k_len: int) -> Tensor:
    """A mask `[1|B, 1|Hq, 1|Sq, Sk]` for queries laid out as `[B, Hk, G * Sq]`."""
    batch, heads, rows, columns = visible.shape
    if rows == 1 and heads == 1:
        return visible.expand(batch, 1, 1, k_len)
    if group == 1:
        return visible
    grouped = visible.reshape(batch, *((1, 1) if heads == 1 else (k_heads, group)), rows, columns)
    return grouped.expand(-1, -1, group, q_len, k_len).reshape(batch, grouped.shape[1], group * q_len, k_len)


def _one_by_one(call: Call) -> Tensor:
    """Documents one after another, neighbours of one length as a batch."""
    assert call.cu_seqlens_q is not None
    documents = torch.diff(call.cu_seqlens_q).tolist()
    runs = [(length, len(list(same))) for length, same in groupby(documents)]
    tail = call.q.shape[2] - sum(documents)
    sizes = [length * count for length, count in runs] + [tail]
    out = []
    # Split, and not sliced, so that the backward writes each gradient once.
    for (length, count), *parts in zip(
        runs, *(t[0].split(sizes, dim=1) for t in (call.q, call.k, call.v)), strict=False
    ):
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in parts)  # [count, H, length, D]
        one = run(call._replace(q=q, k=k, v=v, cu_seqlens_q=None, cu_seqlens_k=None))[0]
        out.append(one.transpose(0, 1).flatten(1, 2))
    return torch.cat([*out, call.q.new_zeros(call.q.shape[1], tail, call.v.shape[-1])], dim=1)[None]


def _packed(call: Call) -> Tensor:
    """Documents side by side, through flash attention's variable-length kernel."""
    assert call.cu_seqlens_q is not None and call.cu_seqlens_k is not None
    q, k, v, q_dead = without_tails(call)
    cu_q, cu_k = call.cu_seqlens_q.int(), call.cu_seqlens_k.int()
    groups: dict[str, Any] = {"enable_gqa": call.group > 1} if _ASK_FOR_GROUPS else {}
    out = varlen_attn(q, k, v, cu_q, cu_k, len(q), len(k), scale=call.scale, window_size=window(call.mask), **groups)
    assert isinstance(out, Tensor)
    return out.transpose(0, 1)[None].masked_fill(q_dead, 0)
