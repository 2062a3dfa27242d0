"""What softmax attention asks of its arguments, each refused by name."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

from attnzoo.masks import Causal, Full, Mask, SlidingWindow
from attnzoo.ops.softmax.common import Call


def checked_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None,
    scale: float | None,
    softcap: float | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    key_lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    return_lse: bool,
    deterministic: bool,
) -> Call:
    """The call with its defaults filled in and its mask in the plainest form, or a ValueError."""
    check_tensors(q, k, v)
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not (q.dtype == k.dtype == v.dtype) or not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must have one floating-point dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if cu_q is not None and cu_k is None:
        cu_k = cu_q
    check_options(q, k, scale, softcap, sinks, dropout_p)
    check_bias(q, k, bias, alibi_slopes, cu_q is not None)
    check_boundaries(q, k, key_lengths, cu_q, cu_k)
    plain = _plain(checked_mask(mask, q, k, cu_q is not None), q.shape[2], k.shape[2], cu_q is not None)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    options = (sinks, dropout_p, key_lengths, cu_q, cu_k, return_lse, bias, alibi_slopes, deterministic)
    return Call(q, k, v, plain, factor, softcap, *options)


def _plain(mask: Mask | Tensor, q_len: int, k_len: int, packed: bool) -> Mask | Tensor:
    """The simplest mask that shows the same, so that the fastest kernel takes it."""
    if isinstance(mask, SlidingWindow) and mask.causal and mask.window >= k_len:
        mask = Causal()
    if isinstance(mask, Causal) and q_len == 1 and not packed:
        return Full()
    return mask


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError unless q, k and v are heads that belong together."""
    shapes = f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k and v must be [B, H, S, D], {shapes}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q must be [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv], {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.shape[1] == 0:
        raise ValueError(f"the key heads of k must divide the query heads of q, {shapes}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")


def check_options(
    q: Tensor, k: Tensor, scale: float | None, softcap: float | None, sinks: Tensor | None, dropout_p: float
) -> None:
    """ValueError for a scalar out of its range, or sinks of another shape than one a query head."""
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be greater than 0 or None, got {softcap}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if sinks is not None and (sinks.shape != q.shape[1:2] or not sinks.dtype.is_floating_point):
        raise ValueError(f"sinks must be [{q.shape[1]}] floating point, {_got(sinks)}")


def checked_mask(mask: Mask | Tensor | None, q: Tensor, k: Tensor, packed: bool) -> Mask | Tensor:
    """The mask, `Full` for None; ValueError for what is no mask or does not fit the scores."""
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
    if not _broadcasts(mask, full):
        raise ValueError(f"mask must broadcast to {list(full)}, got {list(mask.shape)}")
    return mask


def check_bias(q: Tensor, k: Tensor, bias: Tensor | None, alibi_slopes: Tensor | None, packed: bool) -> None:
    """ValueError for a bias or ALiBi slopes of another shape, kind or device than the scores take."""
    if bias is not None:
        full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        if not bias.dtype.is_floating_point or not _broadcasts(bias, full):
            raise ValueError(f"bias must be floating point and broadcast to {list(full)}, {_got(bias)}")
        if bias.device != q.device:
            raise ValueError(f"bias must be on the device of q, {q.device}, got {bias.device}")
        if packed:
            raise ValueError("bias has no meaning for packed sequences; it excludes cu_seqlens_q")
    if alibi_slopes is not None:
        if alibi_slopes.shape not in (q.shape[1:2], q.shape[:2]) or not alibi_slopes.dtype.is_floating_point:
            shapes = f"[{q.shape[1]}] or {list(q.shape[:2])}"
            raise ValueError(f"alibi_slopes must be {shapes} floating point, {_got(alibi_slopes)}")
        if alibi_slopes.device != q.device:
            raise ValueError(f"alibi_slopes must be on the device of q, {q.device}, got {alibi_slopes.device}")
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            raise ValueError("alibi_slopes must not require a gradient; the slopes are fixed")


def check_boundaries(
    q: Tensor, k: Tensor, key_lengths: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None
) -> None:
    """ValueError for lengths and boundaries that do not fit q and k; their values are read on a CPU only."""
    if key_lengths is not None:
        _check_integers("key_lengths", key_lengths)
        if key_lengths.shape != q.shape[:1]:
            raise ValueError(f"key_lengths must be [{q.shape[0]}], got {list(key_lengths.shape)}")
        if cu_q is not None:
            raise ValueError("key_lengths and cu_seqlens_q exclude each other")
        if _readable(key_lengths) and not all(0 <= length <= k.shape[2] for length in key_lengths.tolist()):
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
        if _readable(cu) and not _rises(cu.tolist(), length):
            raise ValueError(f"{name} must start at 0, never fall and end by {length}, got {cu.tolist()}")


def _broadcasts(tensor: Tensor, full: tuple[int, ...]) -> bool:
    return tensor.dim() <= 4 and all(m in (1, n) for m, n in zip(tensor.shape[::-1], full[::-1], strict=False))


def _got(tensor: Tensor) -> str:
    return f"got {list(tensor.shape)} {tensor.dtype}"


def _rises(boundaries: list[int], end: int) -> bool:
    return boundaries[0] == 0 and boundaries[-1] <= end and all(map(operator.le, boundaries, boundaries[1:]))


def _check_integers(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {tensor.dtype}")


def _readable(tensor: Tensor) -> bool:
    """Whether values can be looked at without stalling a GPU or breaking a graph; under vmap there are several."""
    tracing = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return tensor.device.type == "cpu" and not tracing
