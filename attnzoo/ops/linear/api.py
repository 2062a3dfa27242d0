"""`linear_attention` and `linear_step`: validate the call, choose a backend, run it."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Literal, overload

import torch
from torch import Tensor

from attnzoo.ops.explaining import explanation
from attnzoo.ops.launching import interpreted
from attnzoo.ops.linear import chunked, recurrent, reference, triton
from attnzoo.ops.linear.checks import check_boundaries, check_decay, check_dtypes, check_map, check_state, check_tensors
from attnzoo.ops.linear.common import Call, State

_BACKENDS: dict[str, ModuleType] = {
    "triton": triton,
    "recurrent": recurrent,
    "chunked": chunked,
    "reference": reference,
}


@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_state: Literal[True], **options: object
) -> tuple[Tensor, State]: ...


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = ...,
    normalize: bool = ...,
    causal: bool = ...,
    log_decay: Tensor | None = ...,
    scale: float | None = ...,
    key_lengths: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    initial_state: tuple[Tensor, Tensor | None] | None = ...,
    return_state: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


def linear_attention(  # type: ignore[misc]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "elu",
    normalize: bool = True,
    causal: bool = True,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor | None] | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, State]:
    """Linear attention with grouped heads (arXiv 2006.16236), with or without normaliser and decay (2307.08621).

        out_i = sum_j w_ij v_j / sum_j w_ij,    w_ij = scale * decay^(i - j) * map(q_i) . map(k_j)

    over the j <= i (causal) or all j; without `normalize` the sum of the v alone. A query whose normaliser is 0, as of
    one that sees no key, gives 0 and no gradient; nothing is added to the normaliser. The state and all sums are fp32
    (fp64 for fp64), whatever the inputs. Memory and time are linear in the length, forward and backward.

    Args:
        q: queries `[B, Hq, Sq, D]`; fp16, bf16, fp32 or fp64, any strides.
        k: keys `[B, Hk, Sk, D]` of q's dtype; Hk divides Hq, and query heads of a group are neighbours.
        v: values `[B, Hk, Sk, Dv]`; features may be wider (fp32) than the values.
        feature_map: "elu" (elu(x) + 1), "relu" or "identity" (q and k are features already), elementwise, in fp32.
        normalize: divide by the sum of the weights.
        causal: a query sees its own and earlier keys, and Sq == Sk; else all keys.
        log_decay: `[Hk]`, natural log of each key head's decay a token, at most 0; causal only. It has no gradient.
        scale: factor of the weights, not 0; D ** -0.5 unless given. It cancels where `normalize` is set.
        key_lengths: `[B]` integers; keys from there on are padding and hidden. If causal, so are queries: they give 0.
        cu_seqlens: boundaries `[N + 1]` of documents packed along S, with B == 1 and Sq == Sk: each starts from a state
            of its own. Rows past the last boundary give 0.
        initial_state: what earlier keys left: `(s, z)`, `s [N, Hk, D, Dv]` and `z [N, Hk, D]` (None without the
            normaliser) in fp32 (fp64), where N is B or the number of documents. None: zeros.
        return_state: also return the state after each sequence's last real token.
        backend: "auto", "triton" (kernels; heads up to 256), "chunked" (plain PyTorch, linear memory), "recurrent"
            (token by token, without gradients) or "reference" (S x S).

    Returns:
        `[B, Hq, Sq, Dv]` in the values' dtype; with `return_state` also a `State(s, z)`.

    Raises:
        ValueError: for shapes, dtypes or options that do not fit, naming the argument; and if the backend cannot run
            the call, with its reasons.
    """
    call = _call(q, k, v, feature_map, normalize, causal, log_decay, scale, key_lengths, cu_seqlens, initial_state)
    out, state = _choose(call, backend).run(call)
    return (out, state) if return_state else out


def linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: tuple[Tensor, Tensor | None],
    *,
    feature_map: str = "elu",
    log_decay: Tensor | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal `linear_attention` of a few new tokens, whose state is updated in place. It has no gradient.

    Args:
        q, k, v, feature_map, log_decay, scale: as of `linear_attention`.
        state: `(s, z)`, as `initial_state` there; it is normalised where z is not None.
        lengths: `[B]`, how many of each row's tokens are real; the others change nothing and give 0.
        backend: "auto", "triton" (one kernel, 16 tokens at most) or "recurrent" (plain PyTorch).

    Returns:
        `[B, Hq, S, Dv]` in the values' dtype.

    Raises:
        ValueError: as `linear_attention`, before the state is touched.
    """
    normalize = state[1] is not None
    call = _call(q, k, v, feature_map, normalize, True, log_decay, scale, lengths, None, state)
    if backend not in ("auto", "triton", "recurrent"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'recurrent', got {backend!r}")
    assert call.initial is not None
    fused = backend == "triton" or (backend == "auto" and _on_gpu(call) and not triton.step_reasons(call))
    why = triton.step_reasons(call) if fused else recurrent.reasons(call)
    if why:
        raise ValueError(f"linear_step cannot run this call: {'; '.join(why)}")
    return (triton.step if fused else recurrent.step)(call, call.initial)


def explain_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "elu",
    normalize: bool = True,
    causal: bool = True,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor | None] | None = None,
) -> str:
    """Which backend `linear_attention` would run for this call, and why each other one would not; a line each."""
    call = _call(q, k, v, feature_map, normalize, causal, log_decay, scale, key_lengths, cu_seqlens, initial_state)
    chosen = _choose(call, "auto")
    slower = "could run, is slower"
    return explanation(_BACKENDS, call, chosen, reference="quadratic in memory", could=lambda name: slower)


def _choose(call: Call, backend: str) -> ModuleType:
    if backend == "auto":
        if _on_gpu(call) and not triton.reasons(call):
            return triton
        one_token = call.q.shape[2] == 1 and not recurrent.reasons(call)
        return recurrent if one_token else chunked
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {list(_BACKENDS)}, got {backend!r}")
    why = _BACKENDS[backend].reasons(call)
    if why:
        raise ValueError(f"no backend can run this call\n{backend}: {'; '.join(why)}")
    return _BACKENDS[backend]


def _on_gpu(call: Call) -> bool:
    """Whether kernels are the fast way: the interpreter never is."""
    return call.q.device.type == "cuda" and not interpreted()


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str,
    normalize: bool,
    causal: bool,
    log_decay: Tensor | None,
    scale: float | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    initial: tuple[Tensor, Tensor | None] | None,
) -> Call:
    """The call with its defaults filled in, or a ValueError."""
    check_tensors(q, k, v)
    if torch.is_autocast_enabled(q.device.type) and torch.float64 not in (q.dtype, k.dtype):
        dtype = torch.get_autocast_dtype(q.device.type)
        if q.dtype != k.dtype:
            q, k = q.to(dtype), k.to(dtype)
        v = v.to(dtype)
    check_dtypes(q, k, v)
    check_map(feature_map)
    if scale is not None and (not math.isfinite(scale) or scale == 0):
        raise ValueError(f"scale must be finite and not 0, got {scale}")
    check_decay(log_decay, k.shape[1], causal)
    check_boundaries(q, k, key_lengths, cu_seqlens, causal)
    factor = 1.0 if normalize else q.shape[-1] ** -0.5 if scale is None else float(scale)
    call = Call(q, k, v, feature_map, normalize, causal, factor, log_decay, key_lengths, cu_seqlens)
    return call if initial is None else call._replace(initial=check_state(call, initial))
