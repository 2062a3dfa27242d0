"""`torch.func.vmap` over attention: the mapped dimension joins the batch, and one launch does it all.

Where that would not give each sample its own result, samples run one after another: packed sequences, whose batch is 1;
dropout, which draws by place in the batch; sinks of their own; and gradients of sinks and bias, which sum over a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Rule = Callable[..., tuple[Any, Any]]


def forward_rule(op: Any) -> Rule:
    """For `fused_attention`; see `torch.library.register_vmap`."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        mapped, moved = _first(in_dims, args)
        if moved[8] is not None or moved[10] is not None or mapped[3]:
            return _one_by_one(op, info.batch_size, mapped, moved)
        tensors = _joined(info.batch_size, mapped[:11], moved[:11])
        out = op(*tensors, *moved[11:])
        return tuple(t.unflatten(0, (info.batch_size, -1)) for t in out), (0, 0)

    return rule


def backward_rule(op: Any) -> Rule:
    """For `fused_attention_backward`, whose first four arguments come before the forward's."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        mapped, moved = _first(in_dims, args)
        packed, drops, sinks, bias_gradient = (*(moved[n] is not None for n in (12, 14, 7)), moved[-1])
        if packed or drops or sinks or bias_gradient:
            return _one_by_one(op, info.batch_size, mapped, moved)
        ahead = [_batched(*each, info.batch_size) for each in zip(moved[:4], mapped[:4], strict=True)]
        tensors = _joined(info.batch_size, mapped[4:15], moved[4:15])
        *grads, d_sinks, d_bias = op(*ahead, *tensors, *moved[15:])
        grads = [t.unflatten(0, (info.batch_size, -1)) for t in grads]
        return (*grads, d_sinks, d_bias), (0, 0, 0, None, None)

    return rule


def _first(in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> tuple[list[bool], list[Any]]:
    """Which arguments are mapped, and all of them with the mapped dimension first."""
    moved = [arg if dim is None else arg.movedim(dim, 0) for arg, dim in zip(args, in_dims, strict=True)]
    return [dim is not None for dim in in_dims], moved


def _joined(n: int, mapped: list[bool], tensors: list[Any]) -> list[Any]:
    """The forward's tensors for a batch of n times as many."""
    q, k, v, sinks, bias, slopes, dense, key_lengths = zip(tensors[:8], mapped[:8], strict=True)
    batch = q[0].shape[1 if q[1] else 0]
    return [
        *(_batched(*t, n) for t in (q, k, v)),
        sinks[0],
        _spread(*bias, n, batch, 4),
        _spread(*slopes, n, batch, 2),
        _spread(*dense, n, batch, 4),
        _batched(*key_lengths, n),
        *(None, None, None),  # boundaries and seed
    ]


def _batched(t: Tensor | None, mapped: bool, n: int) -> Tensor | None:
    """`[B, ...]` or, mapped, `[n, B, ...]` as `[n * B, ...]`."""
    if t is None:
        return None
    return (t if mapped else t.expand(n, *t.shape)).flatten(0, 1)


def _spread(t: Tensor | None, mapped: bool, n: int, batch: int, dims: int) -> Tensor | None:
    """What broadcasts to the batch, as it is where one serves all, else `[n * B, ...]` of `dims` dimensions."""
    if t is None or (not mapped and (t.dim() < dims or t.shape[0] == 1)):
        return t
    own = tuple(t.shape[1:] if mapped else t.shape)
    own = (1,) * (dims - len(own)) + own
    t = t.reshape(n, *own) if mapped else t.reshape(1, *own)
    return t.expand(n, batch, *own[1:]).flatten(0, 1)


def _one_by_one(op: Any, n: int, mapped: list[bool], args: list[Any]) -> tuple[Any, Any]:
    each = [op(*(arg[i] if m else arg for arg, m in zip(args, mapped, strict=True))) for i in range(n)]
    out = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
    return out, (0,) * len(out)
