"""What the softmax backends share: the validated call, and which query sees which key."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.masks import Causal, Full, Mask, SlidingWindow, mask_from_dict

HALF = (torch.float16, torch.bfloat16)


class Call(NamedTuple):
    """One call of `attention`, validated and with its defaults filled in; what backends judge and run."""

    q: Tensor  # [B, Hq, Sq, D]
    k: Tensor  # [B, Hk, Sk, D]
    v: Tensor  # [B, Hk, Sk, Dv]
    mask: Mask | Tensor
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None  # [Hq]
    dropout_p: float = 0.0
    key_lengths: Tensor | None = None  # [B]
    cu_seqlens_q: Tensor | None = None  # [N + 1]
    cu_seqlens_k: Tensor | None = None  # [N + 1]
    return_lse: bool = False
    bias: Tensor | None = None  # broadcastable to [B, Hq, Sq, Sk]
    alibi_slopes: Tensor | None = None  # [Hq] or [B, Hq]
    deterministic: bool = False

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def trains(self) -> bool:
        """Whether a gradient of this call can be asked for."""
        tensors = (self.q, self.k, self.v, self.sinks, self.bias)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Softmax and sums run in fp32 whatever the inputs are, and in fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache(maxsize=256)
def mask_from_text(text: str) -> Mask:
    """The mask whose `text` this is; the way back from a custom operator's string argument."""
    return mask_from_dict(json.loads(text))


@torch.compiler.assume_constant_result
def globally_deterministic() -> bool:
    """Whether all of PyTorch is told to be deterministic, and not only to warn; compiled graphs are guarded by it."""
    on = torch.are_deterministic_algorithms_enabled()
    return on and not torch.is_deterministic_algorithms_warn_only_enabled()


def window(mask: Mask | Tensor) -> tuple[int, int]:
    """Keys before and after its own that a query sees of a full, causal or windowed mask; -1 for all of them."""
    if isinstance(mask, SlidingWindow):
        return mask.window - 1, mask.ahead
    return (-1, 0) if isinstance(mask, Causal) else (-1, -1)


def extra_reasons(call: Call, *, softcap: bool = False, sinks: bool = False, dropout: bool = False) -> list[str]:
    """What a kernel of others refuses whatever its shapes; the flags say what this one has."""
    out = []
    if call.softcap is not None and not softcap:
        out.append("has no softcap")
    if call.sinks is not None and not sinks:
        out.append("has no sinks")
    if call.bias is not None:
        out.append("has no bias")
    if call.alibi_slopes is not None:
        out.append("has no ALiBi")
    if call.dropout_p > 0 and not dropout:
        out.append("has no dropout")
    if call.key_lengths is not None:
        out.append("has no key_lengths")
    if call.q.dtype not in HALF:
        out.append("runs fp16 and bf16 only")
    if call.q.device.type != "cuda":
        out.append("runs on CUDA only")
    if 0 in (*call.q.shape, *call.k.shape, *call.v.shape):
        out.append("has no kernel for empty tensors")
    if not isinstance(call.mask, Full | Causal | SlidingWindow):
        out.append("has full, causal and sliding-window masks only")
    return out


def inner_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied where their last stride is not 1, as kernels of others want them."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def without_tails(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed q, k and v as `[T, H, D]` with zeros past the last boundary, and which rows of q those are, `[Sq, 1]`.

    Variable-length kernels leave such rows unwritten, forward and backward, and their last tile reads them.
    """
    assert call.cu_seqlens_q is not None and call.cu_seqlens_k is not None
    q_dead = torch.arange(call.q.shape[2], device=call.q.device)[:, None] >= call.cu_seqlens_q[-1]
    k_dead = torch.arange(call.k.shape[2], device=call.q.device)[:, None] >= call.cu_seqlens_k[-1]
    q, k, v = ((t.masked_fill(dead, 0)) for t, dead in ((call.q, q_dead), (call.k, k_dead), (call.v, k_dead)))
    return q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1), q_dead


def visibility(call: Call) -> Tensor:
    """Which query sees which key, written out: bool, broadcastable to `[B, Hq, Sq, Sk]`. Quadratic."""
    q_len, k_len = call.q.shape[2], call.k.shape[2]
    if isinstance(call.mask, Tensor):
        visible = call.mask
    elif call.packed:
        return packed_visibility(call.mask, q_len, k_len, call.cu_seqlens_q, call.cu_seqlens_k)
    else:
        visible = call.mask.dense(q_len, k_len, device=call.q.device)
    if call.key_lengths is not None:
        real = torch.arange(k_len, device=call.q.device) < call.key_lengths[:, None]
        visible = visible & real[:, None, None, :]
    return visible


def packed_visibility(mask: Mask, q_len: int, k_len: int, cu_q: Tensor | None, cu_k: Tensor | None) -> Tensor:
    """The mask inside each document, bool `[q_len, k_len]`; rows and columns past the last boundary are dark."""
    assert cu_q is not None
    q_doc, q_at, k_doc, k_at = packed_positions(q_len, k_len, cu_q, cu_k)
    same = (q_doc[:, None] == k_doc[None, :]) & (q_doc[:, None] < len(cu_q) - 1)
    return same & mask.visible(q_at[:, None], k_at[None, :])


def distances(call: Call) -> Tensor:
    """|i - j| of each query and key, int64 `[Sq, Sk]`, inside each document where packed. Quadratic."""
    q_len, k_len, device = call.q.shape[2], call.k.shape[2], call.q.device
    if call.packed:
        _, q_at, _, k_at = packed_positions(q_len, k_len, call.cu_seqlens_q, call.cu_seqlens_k)
    else:
        q_at, k_at = torch.arange(k_len - q_len, k_len, device=device), torch.arange(k_len, device=device)
    return (q_at[:, None] - k_at[None, :]).abs()


def packed_positions(
    q_len: int, k_len: int, cu_q: Tensor | None, cu_k: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The document of each query and its place in it, aligned bottom right document by document; then the keys'."""
    assert cu_q is not None and cu_k is not None
    q_doc, q_at = _documents(cu_q, q_len)
    k_doc, k_at = _documents(cu_k, k_len)
    shift = torch.diff(cu_k) - torch.diff(cu_q)
    return q_doc, q_at + shift[q_doc.clamp(0, len(shift) - 1)], k_doc, k_at


def _documents(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Each position's document and its place in it. Past the last boundary the document is the number of documents."""
    position = torch.arange(length, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
    return document, position - cu_seqlens[document.clamp(max=len(cu_seqlens) - 2)]
