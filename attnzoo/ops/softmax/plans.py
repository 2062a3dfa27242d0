"""Plans for calls that repeat: what checks and choice came to for a signature, so that both are done once for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.masks import Mask
from attnzoo.ops.softmax.backends import choose
from attnzoo.ops.softmax.checks import check_boundaries, checked_call
from attnzoo.ops.softmax.common import Call


class Plan(NamedTuple):
    """What a call came to, for calls of the same signature."""

    run: Callable[[Call], tuple[Tensor, Tensor | None]]
    mask: Mask | None  # in its plainest form; None where it is the call's own tensor
    scale: float
    dtype: torch.dtype  # of the inputs, autocast or not
    deterministic: bool


PLANS: dict[tuple[object, ...], Plan] = {}


def run(
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
    plan = PLANS.get(key) if key is not None else None
    if plan is None:
        call = checked_call(q, k, v, mask, scale, softcap, *options)
        backend_run = choose(call, backend).run
        if key is not None:
            if len(PLANS) >= 4096:  # lengths that never come back would fill the memory
                PLANS.clear()
            plain = None if isinstance(call.mask, Tensor) else call.mask
            PLANS[key] = Plan(backend_run, plain, call.scale, call.q.dtype, call.deterministic)
        return backend_run(call)
    if key_lengths is not None or cu_q is not None:
        check_boundaries(q, k, key_lengths, cu_q, cu_q if cu_k is None else cu_k)
    if not q.dtype == k.dtype == v.dtype == plan.dtype:
        q, k, v = q.to(plan.dtype), k.to(plan.dtype), v.to(plan.dtype)
    return plan.run(
        Call(
            q,
            k,
            v,
            mask if plan.mask is None else plan.mask,  # type: ignore[arg-type]
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
