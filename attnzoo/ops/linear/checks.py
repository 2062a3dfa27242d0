"""What the linear ops ask of their arguments, each refused by name."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.linear.common import FEATURE_MAPS, Call, State
from attnzoo.ops.softmax.common import accumulation_dtype


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError unless q, k and v are heads that belong together."""
    shapes = f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k and v must be [B, H, S, D], {shapes}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q must be [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv], {shapes}")
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"the key heads of k must divide the query heads of q, {shapes}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")


def check_dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError unless q and k have one dtype, and v another at most as precise as the sums."""
    if q.dtype != k.dtype or not q.dtype.is_floating_point or not v.dtype.is_floating_point:
        raise ValueError(f"q and k must have one floating-point dtype, got {q.dtype} and {k.dtype} (v: {v.dtype})")
    if accumulation_dtype(k.dtype) != accumulation_dtype(v.dtype):
        raise ValueError(f"v must be fp64 exactly where k is, got {v.dtype} and {k.dtype}")


def check_map(feature_map: str) -> None:
    """ValueError for a feature map that the ops do not know."""
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be one of {list(FEATURE_MAPS)}, got {feature_map!r}")


def check_decay(log_decay: Tensor | None, heads: int, causal: bool) -> None:
    """ValueError for a decay that is none, or that nothing can be done with."""
    if log_decay is None:
        return
    if not causal:
        raise ValueError("log_decay needs causal=True: it counts the tokens since a key")
    if log_decay.shape != (heads,) or not log_decay.dtype.is_floating_point:
        raise ValueError(f"log_decay must be [{heads}] floating point, got {list(log_decay.shape)} {log_decay.dtype}")
    if log_decay.requires_grad and torch.is_grad_enabled():
        raise ValueError("log_decay must not require a gradient; the decay is fixed")
    if _readable(log_decay) and not bool((log_decay <= 0).all() & log_decay.isfinite().all()):
        raise ValueError(f"log_decay must be finite and at most 0, got {log_decay.tolist()}")


def check_boundaries(q: Tensor, k: Tensor, key_lengths: Tensor | None, cu_seqlens: Tensor | None, causal: bool) -> None:
    """ValueError for lengths and boundaries that do not fit q and k."""
    q_len, k_len = q.shape[2], k.shape[2]
    if (causal or cu_seqlens is not None) and q_len != k_len:
        raise ValueError(f"causal and packed calls need as many queries as keys, got {q_len} and {k_len}")
    if key_lengths is not None:
        _check_integers("key_lengths", key_lengths)
        if cu_seqlens is not None:
            raise ValueError("key_lengths and cu_seqlens exclude each other")
        if key_lengths.shape != q.shape[:1]:
            raise ValueError(f"key_lengths must be [{q.shape[0]}], got {list(key_lengths.shape)}")
        if _readable(key_lengths) and bool(((key_lengths < 0) | (key_lengths > k_len)).any()):
            raise ValueError(f"key_lengths must be in [0, {k_len}], got {key_lengths.tolist()}")
    if cu_seqlens is None:
        return
    _check_integers("cu_seqlens", cu_seqlens)
    if q.shape[0] != 1:
        raise ValueError(f"packed sequences need a batch of 1, got q {list(q.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must be [N + 1] with N >= 1, got {list(cu_seqlens.shape)}")
    if _readable(cu_seqlens):
        wrong = int(cu_seqlens[0]) != 0 or bool((torch.diff(cu_seqlens) < 0).any()) or int(cu_seqlens[-1]) > k_len
        if wrong:
            raise ValueError(f"cu_seqlens must start at 0, never fall and end by {k_len}, got {cu_seqlens.tolist()}")


def check_state(call: Call, initial: tuple[Tensor, Tensor | None]) -> State:
    """The initial state as a `State`, or a ValueError where it is not one of this call."""
    s, z = initial
    n, heads, dim, v_dim = call.sequences, call.k.shape[1], call.k.shape[3], call.v.shape[3]
    dtype = accumulation_dtype(call.k.dtype)
    if (z is not None) != call.normalize:
        raise ValueError(f"initial_state must have z exactly where normalize is set, got z {z is not None}")
    for name, t, shape in (("s", s, (n, heads, dim, v_dim)), ("z", z, (n, heads, dim))):
        if t is not None and (t.shape != shape or t.dtype != dtype or t.device != call.k.device):
            raise ValueError(
                f"{name} of initial_state must be {list(shape)} {dtype} on {call.k.device}, "
                f"got {list(t.shape)} {t.dtype} on {t.device}"
            )
    return State(s, z)


def _check_integers(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {tensor.dtype}")


def _readable(tensor: Tensor) -> bool:
    """Whether values can be looked at without stalling a GPU or breaking a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
