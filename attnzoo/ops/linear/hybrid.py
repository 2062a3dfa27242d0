"""Softmax attention near, linear attention far, one normaliser (LoLCATs, arXiv 2410.10254).

    out_i = (sum_near g e^(s_ij - c_i) v_j + sum_far f_ij v_j) / (sum_near g e^(s_ij - c_i) + sum_far f_ij)

near: 0 <= i - j < window, far: i - j >= window, s_ij = scale * q_i . k_j, f_ij = map(q_i) . map(k_j), and c_i the
largest near score, which is part of the definition: it sets how much the near weighs against the far.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.launching import interpreted
from attnzoo.ops.linear.api import linear_attention
from attnzoo.ops.linear.checks import check_boundaries, check_dtypes, check_map, check_tensors
from attnzoo.ops.linear.common import apply_map, inverse_or_zero
from attnzoo.ops.linear.triton.hybrid import hybrid_attention as fused
from attnzoo.ops.linear.triton.hybrid import hybrid_reasons
from attnzoo.ops.softmax.common import accumulation_dtype

_LEAST_BLOCK = 32  # queries that are looked at together, unless the window is wider


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    q_features: Tensor | None = None,
    k_features: Tensor | None = None,
    feature_map: str = "elu",
    near_weight: Tensor | None = None,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention: softmax over the last `window` keys, linear over those before, one normaliser (2410.10254).

    Sums run in fp32 (fp64 for fp64). Memory and time grow with S * window, forward and backward.

    Args:
        q: queries `[B, Hq, S, D]` of the softmax; fp16, bf16, fp32 or fp64.
        k: keys `[B, Hk, S, D]` of q's dtype; Hk divides Hq.
        v: values `[B, Hk, S, Dv]`.
        window: keys that the softmax sees, the query's own among them; at least 1.
        q_features, k_features: what `feature_map` is applied to, `[B, Hq, S, F]` and `[B, Hk, S, F]`; None: q and k.
            They give weights of at least 0 if the normaliser is to be one.
        feature_map: "elu", "relu" or "identity", elementwise.
        near_weight: `[Hq]`, the factor g of the near weights; None: 1.
        scale: of the near scores; D ** -0.5 unless given.
        key_lengths: `[B]`; tokens from there on are padding, which give 0.
        cu_seqlens: boundaries `[N + 1]` of packed documents, with B == 1. Rows past the last give 0.
        backend: "auto", "triton" (fused kernels, which auto takes on a GPU; heads up to 128), "blocked" (plain PyTorch)
            or "reference" (S x S).

    Returns:
        `[B, Hq, S, Dv]` in the values' dtype.

    Raises:
        ValueError: for shapes, dtypes or options that do not fit, naming the argument.
    """
    if backend not in ("auto", "triton", "blocked", "reference"):
        raise ValueError(f"backend must be 'auto', 'triton', 'blocked' or 'reference', got {backend!r}")
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window must be an integer of at least 1, got {window!r}")
    if near_weight is not None and near_weight.shape != q.shape[1:2]:
        raise ValueError(f"near_weight must be [{q.shape[1]}], got {list(near_weight.shape)}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    check_map(feature_map)
    check_tensors(q, k, v)
    check_dtypes(q, k, v)
    check_boundaries(q, k, key_lengths, cu_seqlens, causal=True)
    features = q if q_features is None else q_features, k if k_features is None else k_features
    check_tensors(*features, v)
    check_dtypes(*features, v)
    with torch.autocast(q.device.type, enabled=False):
        if _takes_kernels(q, features[0], v, backend):
            gain = q.new_ones(q.shape[1], dtype=torch.float32) if near_weight is None else near_weight
            factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
            late = min(window, q.shape[2])
            given = (q_features, k_features, gain, key_lengths, cu_seqlens)
            return fused(q, k, v, *given, late, feature_map, factor)[0]
        return _run(q, k, v, features, window, feature_map, near_weight, scale, key_lengths, cu_seqlens, backend)


def _takes_kernels(q: Tensor, f_q: Tensor, v: Tensor, backend: str) -> bool:
    """Whether the fused kernels run the call; a ValueError if they are named and cannot."""
    on_gpu = q.device.type == "cuda" and not interpreted()  # kernels are the fast way, the interpreter never is
    if backend != "triton" and (backend != "auto" or not on_gpu):
        return False
    why = hybrid_reasons(q, f_q, v)
    if why and backend == "triton":
        raise ValueError(f"no backend can run this call\ntriton: {'; '.join(why)}")
    return not why


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: tuple[Tensor, Tensor],
    window: int,
    feature_map: str,
    near_weight: Tensor | None,
    scale: float | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> Tensor:
    if q.shape[2] == 0:
        return v.new_zeros(*q.shape[:3], v.shape[3])
    dtype, out_dtype = accumulation_dtype(q.dtype), v.dtype
    document, live = _documents(q, key_lengths, cu_seqlens)
    q, k, v = (t.to(dtype).masked_fill(~live, 0) for t in (q, k, v))
    f_q, f_k = (apply_map(feature_map, f.to(dtype).masked_fill(~live, 0)).masked_fill(~live, 0) for f in features)
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # the normaliser is one more value
    grouped = q.unflatten(1, (k.shape[1], -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    gain = q.new_ones(q.shape[1]) if near_weight is None else near_weight.to(dtype)
    gain = gain.reshape(k.shape[1], -1, 1, 1)  # [Hk, G, 1, 1]
    if backend == "reference":
        out = _near_reference(grouped, k, v, window, document, gain)
        out = out + _far_reference(f_q.unflatten(1, (k.shape[1], -1)), f_k, v, window, document)
    else:
        out = _near(grouped, k, v, window, document, gain)
        out = out + _far(f_q, f_k, v, window, document, cu_seqlens).unflatten(1, (k.shape[1], -1))
    out = out[..., :-1] * inverse_or_zero(out[..., -1:])
    return out.flatten(1, 2).masked_fill(~live, 0).to(out_dtype)


def _documents(q: Tensor, key_lengths: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each token's document `[S]`, and which tokens are real, `[1 | B, 1, S, 1]`."""
    place = torch.arange(q.shape[2], device=q.device)
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens[1:].contiguous(), place, right=True)
        return document, (place < cu_seqlens[-1])[None, None, :, None]
    document = torch.zeros_like(place)
    if key_lengths is None:
        return document, torch.ones_like(place, dtype=torch.bool)[None, None, :, None]
    return document, (place < key_lengths[:, None])[:, None, :, None]


def near_weights(scores: Tensor, visible: Tensor, gain: Tensor) -> Tensor:
    """g * exp(scores - their largest) of the visible keys, 0 elsewhere and where none is visible."""
    scores = scores.masked_fill(~visible, -math.inf)
    top = scores.amax(-1, keepdim=True)
    return gain * torch.exp(scores - top.masked_fill(top == -math.inf, 0))


def _near(q: Tensor, k: Tensor, v: Tensor, window: int, document: Tensor, gain: Tensor) -> Tensor:
    """Sums over the window `[B, Hk, G, S, Dv + 1]`: blocks of queries over their own block of keys and the last one."""
    length = q.shape[3]
    size = min(max(window, _LEAST_BLOCK), length)
    blocks = -(-length // size)
    end = blocks * size - length
    q = F.pad(q, (0, 0, 0, end)).unflatten(3, (blocks, size))  # [B, Hk, G, n, b, D]
    k, v = (F.pad(t, (0, 0, size, end)).unflatten(2, (blocks + 1, size)) for t in (k, v))
    k, v = (torch.cat([t[:, :, :-1], t[:, :, 1:]], dim=3)[:, :, None] for t in (k, v))  # [B, Hk, 1, n, 2 b, D]
    keys = F.pad(document, (size, end), value=-1).unflatten(0, (blocks + 1, size))
    keys = torch.cat([keys[:-1], keys[1:]], dim=1)  # [n, 2 b]; -1: no token
    age = torch.arange(size, device=q.device)[:, None] + size - torch.arange(2 * size, device=q.device)
    visible = (keys[:, size:, None] == keys[:, None]) & (keys[:, None] >= 0) & (age >= 0) & (age < window)
    weights = near_weights(q @ k.mT, visible, gain[..., None])
    return (weights @ v).flatten(3, 4)[:, :, :, :length]


def _far(f_q: Tensor, f_k: Tensor, v: Tensor, window: int, document: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sums over all before the window `[B, Hq, S, Dv + 1]`: linear attention to keys that come `window` tokens late."""
    lag = min(window, f_k.shape[2])
    late = F.pad(document, (lag, 0), value=-1)[: len(document)]
    same = (late == document)[:, None]
    f_k, v = (F.pad(t, (0, 0, lag, 0))[:, :, : len(document)].masked_fill(~same, 0) for t in (f_k, v))
    return linear_attention(
        f_q, f_k, v, feature_map="identity", normalize=False, scale=1.0, cu_seqlens=cu_seqlens, backend="chunked"
    )


def _near_reference(q: Tensor, k: Tensor, v: Tensor, window: int, document: Tensor, gain: Tensor) -> Tensor:
    age, same = _ages(document)
    return near_weights(q @ k[:, :, None].mT, same & (age >= 0) & (age < window), gain) @ v[:, :, None]


def _far_reference(f_q: Tensor, f_k: Tensor, v: Tensor, window: int, document: Tensor) -> Tensor:
    age, same = _ages(document)
    return ((f_q @ f_k[:, :, None].mT) * (same & (age >= window))) @ v[:, :, None]


def _ages(document: Tensor) -> tuple[Tensor, Tensor]:
    place = torch.arange(len(document), device=document.device)
    return place[:, None] - place, document[:, None] == document
