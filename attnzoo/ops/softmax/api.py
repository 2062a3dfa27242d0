"""`attention`: validate the call, choose a backend, run it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from attnzoo.masks import Causal, Full, Mask, SlidingWindow
from attnzoo.ops.softmax import choice, cudnn, fa3, flash, flash4, reference, sdpa, tiled
from attnzoo.ops.softmax.checks import check_bias, check_boundaries, check_options, check_tensors, checked_mask
from attnzoo.ops.softmax.common import Call
from attnzoo.ops.softmax.triton import backend as triton

_BACKENDS: dict[str, ModuleType] = {
    "sdpa": sdpa,
    "sdpa-flash": flash,
    "sdpa-cudnn": cudnn,
    "flash-attn-4": flash4,
    "fa3-fwd": fa3,
    "triton": triton,
    "tiled": tiled,
    "reference": reference,
}


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
    bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    key_lengths: Tensor | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    deterministic: bool = ...,
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
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
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
        bias: added to the scaled and capped scores: floating point, broadcastable to `[B, Hq, Sq, Sk]`; -inf hides a
            key as a mask does. It gets a gradient of its own shape. Not for packed sequences.
        alibi_slopes: `[Hq]` or `[B, Hq]` fp32; slope * |i - j| is taken off the capped score of query i and key j, both
            counted along the keys as masks count them, inside each document where packed (ALiBi, arXiv 2108.12409).
        sinks: one logit a query head, `[Hq]`, that takes part in the softmax and gives no value (gpt-oss). It counts in
            the logsumexp.
        dropout_p: probability in [0, 1) that an attention weight is dropped; the rest is scaled up.
        key_lengths: `[B]` integers; keys from there on are padding and hidden. The mask's alignment stays by shape.
        cu_seqlens_q, cu_seqlens_k: boundaries `[N + 1]` of documents packed along Sq and Sk, with B == 1. Documents
            see only themselves, and the mask applies inside each. Rows past the last boundary give 0. Without
            cu_seqlens_k the keys share the queries' boundaries.
        return_lse: also return the natural logsumexp of the scores.
        deterministic: the backward gives bit-equal gradients each time; set for all calls by
            `torch.use_deterministic_algorithms(True)`.
        backend: "auto", "sdpa" (PyTorch's kernels), "triton" (fused kernels of this package), "tiled" (plain PyTorch,
            linear memory) or "reference" (S x S).

    Returns:
        `[B, Hq, Sq, Dv]` in the inputs' dtype; with `return_lse` also `[B, Hq, Sq]` in fp32 (fp64).

    Raises:
        ValueError: for shapes, dtypes or options that do not fit, naming the argument; and if the backend cannot run
            the call, with its reasons.
    """
    options = (bias, alibi_slopes, sinks, dropout_p, key_lengths, cu_seqlens_q, cu_seqlens_k, return_lse, deterministic)
    if torch.compiler.is_compiling():
        call = _call(q, k, v, mask, scale, softcap, *options)
        out, lse = _choose(call, backend).run(call)
    else:
        out, lse = _run(q, k, v, mask, scale, softcap, *options, backend)
    return (out, lse) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
) -> str:
    """Which backend `attention` would run for this call, and why each other one would not; a line each."""
    options = (bias, alibi_slopes, sinks, dropout_p, key_lengths, cu_seqlens_q, cu_seqlens_k, return_lse, deterministic)
    call = _call(q, k, v, mask, scale, softcap, *options)
    names, source = choice.order(call)
    chosen = _choose(call, "auto")
    lines = []
    for name, module in _BACKENDS.items():
        if module is chosen:
            lines.append(f"{name}: runs ({source})")
        elif name == "reference":
            lines.append(f"{name}: quadratic in memory, runs only when asked for")
        else:
            why = module.reasons(call) or ["could run, is slower" if name in names else "could run, if asked for"]
            lines.append(f"{name}: {'; '.join(why)}")
    return "\n".join(lines)


class _Plan(NamedTuple):
    """What a call came to, for calls of the same signature."""

    run: Callable[[Call], tuple[Tensor, Tensor | None]]
    mask: Mask | Tensor
    scale: float
    dtype: torch.dtype  # of the inputs, autocast or not
    deterministic: bool


_PLANS: dict[tuple[object, ...], _Plan] = {}


def _run(
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
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Run the call, by the plan of its signature where there is one: checks and choice take longer than a look."""
    options = (bias, alibi_slopes, sinks, dropout_p, key_lengths, cu_q, cu_k, return_lse, deterministic)
    others = (bias, alibi_slopes, sinks, key_lengths, cu_q, cu_k)
    key = _signature(q, k, v, mask, others, (scale, softcap, dropout_p, return_lse, deterministic, backend))
    plan = _PLANS.get(key) if key is not None else None
    if plan is None:
        call = _call(q, k, v, mask, scale, softcap, *options)
        run = _choose(call, backend).run
        if key is not None:
            if len(_PLANS) >= 4096:  # lengths that never come back would fill the memory
                _PLANS.clear()
            _PLANS[key] = _Plan(run, call.mask, call.scale, call.q.dtype, call.deterministic)
        return run(call)
    if key_lengths is not None or cu_q is not None:
        check_boundaries(q, k, key_lengths, cu_q, cu_q if cu_k is None else cu_k)
    if q.dtype != plan.dtype:
        q, k, v = q.to(plan.dtype), k.to(plan.dtype), v.to(plan.dtype)
    return plan.run(
        Call(
            q,
            k,
            v,
            mask if isinstance(mask, Tensor) else plan.mask,
            plan.scale,
            softcap,
            sinks,
            dropout_p,
            key_lengths,
            cu_q,
            cu_q if cu_k is None else cu_k,
            return_lse,
            bias,
            alibi_slopes,
            plan.deterministic,
        )
    )


def _signature(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None,
    others: tuple[Tensor | None, ...],
    scalars: tuple[object, ...],
) -> tuple[object, ...] | None:
    """All that checks and choice look at; None where they look at values, or something has no hash."""
    device = q.device
    kind = device.type
    bias, slopes, sinks, lengths, cu_q, cu_k = others
    if kind == "cpu" and cu_q is not None:  # boundaries on a CPU are read, to choose by
        return None
    grad = torch.is_grad_enabled()
    bare = bias is None and slopes is None and sinks is None and lengths is None and cu_q is None and cu_k is None
    key = (
        q.shape,
        k.shape,
        v.shape,
        q.dtype,
        k.dtype,
        v.dtype,
        device,
        k.device,
        v.device,
        grad and (q.requires_grad or k.requires_grad or v.requires_grad),
        mask.text if isinstance(mask, Mask) else None if mask is None else (type(mask), mask.shape, mask.dtype),
        scalars,
        None if bare else tuple([None if t is None else _sketch(t, grad) for t in others]),
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        hash(key)
    except TypeError:  # symbolic lengths
        return None
    return key


def _sketch(t: Tensor, grad: bool) -> tuple[object, ...]:
    return t.shape, t.dtype, t.device, grad and t.requires_grad


def _choose(call: Call, backend: str) -> ModuleType:
    if backend != "auto" and backend not in _BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {list(_BACKENDS)}, got {backend!r}")
    refusals = []
    for name in choice.order(call)[0] if backend == "auto" else (backend,):
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
