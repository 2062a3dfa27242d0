"""`attention`: validate the call, choose a backend, run it."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Literal, overload

import torch
from torch import Tensor

from attnzoo.masks import Causal, Full, Mask, SlidingWindow
from attnzoo.ops.softmax import reference, sdpa, tiled
from attnzoo.ops.softmax.common import Call

_BACKENDS: dict[str, ModuleType] = {"sdpa": sdpa, "tiled": tiled, "reference": reference}
_AUTOMATIC = ("sdpa", "tiled")  # fastest first; the reference is quadratic in memory and runs only when named


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: object
) -> tuple[Tensor, Tensor]: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    key_lengths: Tensor | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


def attention(  # type: ignore[misc]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention with grouped heads (arXiv 1706.03762, 2305.13245); keys are never repeated in memory.

    Softmax and sums run in fp32 (fp64 for fp64). A query that sees no key gives 0, logsumexp -inf and zero gradients.
    Under autocast the inputs are cast to its dtype, as PyTorch's own attention does.

    Args:
        q: queries `[B, Hq, Sq, D]`; fp16, bf16, fp32 or fp64, any strides.
        k: keys `[B, Hk, Sk, D]`; Hk divides Hq, and query heads `g * Hq // Hk ...` of a group are neighbours.
        v: values `[B, Hk, Sk, Dv]`.
        mask: one of `attnzoo.masks`, aligned bottom right; or bool, broadcastable to `[B, Hq, Sq, Sk]`, True where
            visible; None for all.
        scale: factor of the scores; D ** -0.5 unless given.
        softcap: c > 0 replaces each scaled score s by c * tanh(s / c) (Gemma 2, arXiv 2408.00118).
        sinks: one logit a query head, `[Hq]`, that takes part in the softmax and gives no value (gpt-oss). It counts in
            the logsumexp.
        dropout_p: probability in [0, 1) that an attention weight is dropped; the rest is scaled up.
        key_lengths: `[B]` integers; keys from there on are padding and hidden. The mask's alignment stays by shape.
        cu_seqlens_q, cu_seqlens_k: boundaries `[N + 1]` of documents packed along Sq and Sk, with B == 1. Documents
            see only themselves, and the mask applies inside each. Rows past the last boundary give 0. Without
            cu_seqlens_k the keys share the queries' boundaries.
        return_lse: also return the natural logsumexp of the scores.
        backend: "auto", "sdpa" (PyTorch's kernels), "tiled" (plain PyTorch, linear memory) or "reference" (S x S).

    Returns:
        `[B, Hq, Sq, Dv]` in the inputs' dtype; with `return_lse` also `[B, Hq, Sq]` in fp32 (fp64).

    Raises:
        ValueError: for shapes, dtypes or options that do not fit, naming the argument; and if the backend cannot run
            the call, with its reasons.
    """
    call = _call(q, k, v, mask, scale, softcap, sinks, dropout_p, key_lengths, cu_seqlens_q, cu_seqlens_k, return_lse)
    out, lse = _choose(call, backend).run(call)
    return (out, lse) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
) -> str:
    """Which backend `attention` would run for this call, and why each other one would not; a line each."""
    call = _call(q, k, v, mask, scale, softcap, sinks, dropout_p, key_lengths, cu_seqlens_q, cu_seqlens_k, return_lse)
    chosen = _choose(call, "auto")
    lines = []
    for name, module in _BACKENDS.items():
        if module is chosen:
            lines.append(f"{name}: runs")
        elif name not in _AUTOMATIC:
            lines.append(f"{name}: quadratic in memory, runs only when asked for")
        else:
            lines.append(f"{name}: " + ("; ".join(module.reasons(call)) or "could run, is slower"))
    return "\n".join(lines)


def _choose(call: Call, backend: str) -> ModuleType:
    if backend != "auto" and backend not in _BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {list(_BACKENDS)}, got {backend!r}")
    refusals = []
    for name in _AUTOMATIC if backend == "auto" else (backend,):
        why = _BACKENDS[name].reasons(call)
        if not why:
            return _BACKENDS[name]
        refusals.append(f"{name}: {'; '.join(why)}")
    raise ValueError("no backend can run this call\n" + "\n".join(refusals))


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout_p: float,
    key_lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    return_lse: bool,
) -> Call:
    """The call with its defaults filled in and its mask in the plainest form, or a ValueError."""
    _check_tensors(q, k, v)
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not (q.dtype == k.dtype == v.dtype) or not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must have one floating-point dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if cu_q is not None and cu_k is None:
        cu_k = cu_q
    _check_options(q, k, scale, softcap, sinks, dropout_p)
    _check_boundaries(q, k, key_lengths, cu_q, cu_k)
    plain = _plain(_checked_mask(mask, q, k, cu_q is not None), q.shape[2], k.shape[2], cu_q is not None)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return Call(q, k, v, plain, factor, softcap, sinks, dropout_p, key_lengths, cu_q, cu_k, return_lse)


def _plain(mask: Mask | Tensor, q_len: int, k_len: int, packed: bool) -> Mask | Tensor:
    """The simplest mask that shows the same, so that the fastest kernel takes it."""
    if isinstance(mask, SlidingWindow) and mask.causal and mask.window >= k_len:
        mask = Causal()
    if isinstance(mask, Causal) and q_len == 1 and not packed:
        return Full()
    return mask


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k and v must be [B, H, S, D], {shapes}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q must be [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv], {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.shape[1] == 0:
        raise ValueError(f"the key heads of k must divide the query heads of q, {shapes}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")


def _check_options(
    q: Tensor, k: Tensor, scale: float | None, softcap: float | None, sinks: Tensor | None, dropout_p: float
) -> None:
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be greater than 0 or None, got {softcap}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if sinks is not None and (sinks.shape != q.shape[1:2] or not sinks.dtype.is_floating_point):
        raise ValueError(f"sinks must be [{q.shape[1]}] floating point, got {list(sinks.shape)} {sinks.dtype}")


def _checked_mask(mask: Mask | Tensor | None, q: Tensor, k: Tensor, packed: bool) -> Mask | Tensor:
    if mask is None:
        return Full()
    if isinstance(mask, Mask):
        if mask.heads not in (None, q.shape[1]):
            raise ValueError(f"mask must be made for the {q.shape[1]} query heads of q, got one for {mask.heads}")
        return mask
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must be one of attnzoo.masks or a bool tensor, got {got}")
    if packed:
        raise ValueError("mask must be one of attnzoo.masks where cu_seqlens_q is given, got a tensor")
    fits = mask.dim() <= 4 and all(m in (1, n) for m, n in zip(mask.shape[::-1], full[::-1], strict=False))
    if not fits:
        raise ValueError(f"mask must broadcast to {list(full)}, got {list(mask.shape)}")
    return mask


def _check_boundaries(
    q: Tensor, k: Tensor, key_lengths: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None
) -> None:
    if key_lengths is not None:
        _check_integers("key_lengths", key_lengths)
        if key_lengths.shape != q.shape[:1]:
            raise ValueError(f"key_lengths must be [{q.shape[0]}], got {list(key_lengths.shape)}")
        if cu_q is not None:
            raise ValueError("key_lengths and cu_seqlens_q exclude each other")
        if _readable(key_lengths) and bool(((key_lengths < 0) | (key_lengths > k.shape[2])).any()):
            raise ValueError(f"key_lengths must be in [0, {k.shape[2]}], got {key_lengths.tolist()}")
    if cu_q is None and cu_k is None:
        return
    if cu_q is None or cu_k is None:
        raise ValueError("cu_seqlens_k needs cu_seqlens_q")
    if q.shape[0] != 1:
        raise ValueError(f"packed sequences need a batch of 1, got q {list(q.shape)}")
    if cu_q.shape != cu_k.shape:
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must match, got {list(cu_q.shape)} and {list(cu_k.shape)}")
    for name, cu, length in (("cu_seqlens_q", cu_q, q.shape[2]), ("cu_seqlens_k", cu_k, k.shape[2])):
        _check_integers(name, cu)
        if cu.dim() != 1 or cu.shape[0] < 2:
            raise ValueError(f"{name} must be [N + 1] with N >= 1, got {list(cu.shape)}")
        if _readable(cu) and (int(cu[0]) != 0 or bool((torch.diff(cu) < 0).any()) or int(cu[-1]) > length):
            raise ValueError(f"{name} must start at 0, never fall and end by {length}, got {cu.tolist()}")


def _check_integers(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {tensor.dtype}")


def _readable(tensor: Tensor) -> bool:
    """Whether values can be looked at without stalling a GPU or breaking a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
