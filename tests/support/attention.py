"""Softmax attention three times: the tested backend, plain PyTorch in the same dtype, and the fp64 reference."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnzoo import ops
from attnzoo.masks import Full, Mask
from attnzoo.ops.softmax.common import packed_visibility
from tests.support.compare import assert_as_accurate

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# The interpreter computes in NumPy, which has no bf16 of its own, and rounds it wrongly.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
LEARNED = ("sinks", "bias")


@dataclass
class Case:
    """One call of `attention`: shapes and options, with the tensors among them drawn or given on the CPU."""

    name: str
    heads: tuple[int, int] = (2, 1)
    lengths: tuple[int, int] = (37, 37)
    dims: tuple[int, int] = (16, 16)
    batch: int = 2
    mask: Mask | Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    trains: bool = True
    # A query that sees one key gives none of it back through the output: 0 is left of a sum, and of rounding. A large
    # gradient of the logsumexp shows the rest.
    d_lse: float = 1.0

    def draw(self, dtype: torch.dtype) -> list[Tensor]:
        """Fresh q, k and v."""
        shapes = zip((self.heads[0], self.heads[1], self.heads[1]), (0, 1, 1), (0, 0, 1), strict=True)
        return [
            torch.randn(self.batch, heads, self.lengths[side], self.dims[last], device=DEVICE)
            .to(dtype)
            .requires_grad_(self.trains)
            for heads, side, last in shapes
        ]

    def settings(self) -> dict[str, Any]:
        """The options with their tensors on the device, sinks and bias as leaves."""
        out = {"mask": self.mask, **self.options}
        out = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in out.items()}
        for name in LEARNED:
            if self.trains and name in out:
                out[name] = out[name].detach().clone().requires_grad_()
        return out


def visible_in(q: Tensor, k: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Which query sees which key, bool `[B, Hq, Sq, Sk]`, written out from all options that hide."""
    mask, q_len, k_len = options.get("mask"), q.shape[2], k.shape[2]
    rule = Full() if mask is None else mask
    cu_q, cu_k = options.get("cu_seqlens_q"), options.get("cu_seqlens_k")
    if cu_q is not None:
        visible = packed_visibility(rule, q_len, k_len, cu_q, cu_q if cu_k is None else cu_k)
    elif isinstance(rule, Tensor):
        visible = rule
    else:
        visible = rule.dense(q_len, k_len, device=q.device)
    visible = visible.expand(*q.shape[:3], k_len)
    if options.get("key_lengths") is not None:
        real = torch.arange(k_len, device=q.device) < options["key_lengths"][:, None]
        visible = visible & real[:, None, None]
    if options.get("bias") is not None:
        visible = visible & (options["bias"] > -math.inf)
    return visible


def plain(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, options: Mapping[str, Any], keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output in the inputs' dtype and logsumexp in fp32 (fp64), as anyone would write them in PyTorch.

    `keep` are the weights that dropout left, bool `[B, Hq, Sq, Sk]`.
    """
    group, scale = q.shape[1] // k.shape[1], options.get("scale")
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if options.get("softcap") is not None:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    if options.get("bias") is not None:
        scores = scores + options["bias"].to(q.dtype)
    if options.get("alibi_slopes") is not None:
        slopes = options["alibi_slopes"].to(q.dtype)
        scores = scores - slopes.reshape(-1, q.shape[1], 1, 1) * _distances(q, k, options)
    blind = ~visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible, -math.inf).masked_fill(blind, 0)
    if options.get("sinks") is not None:
        sinks = options["sinks"].to(q.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], -1)
    p = torch.softmax(scores, -1)[..., : k.shape[2]].masked_fill(blind, 0)
    if keep is not None:
        p = torch.where(keep, p / (1 - options["dropout_p"]), 0)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return p @ v, torch.logsumexp(wide, -1).masked_fill(blind[..., 0], -math.inf)


def _distances(q: Tensor, k: Tensor, options: Mapping[str, Any]) -> Tensor:
    """|i - j| in q's dtype, inside each document where packed."""
    q_len, k_len = q.shape[2], k.shape[2]
    i = torch.arange(k_len - q_len, k_len, device=q.device)
    j = torch.arange(k_len, device=q.device)
    if options.get("cu_seqlens_q") is not None:
        cu_q, cu_k = (options[n].tolist() for n in ("cu_seqlens_q", "cu_seqlens_k"))
        for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
            i[a:b] = torch.arange(d - c - (b - a), d - c, device=q.device)
            j[c:d] = torch.arange(d - c, device=q.device)
    return (i[:, None] - j).abs().to(q.dtype)


def as_others(dtype: torch.dtype, leaves: Sequence[Tensor], options: Mapping[str, Any]) -> tuple[list[Tensor], dict]:
    """Leaves and options for a competitor in `dtype`: poison becomes 0, so that it cannot hide a leak of ours.

    Fp64 makes every tensor fp64; otherwise sinks, bias and slopes keep the dtype that they came in.
    """
    own = [t.detach().masked_fill(~t.isfinite() & (t != -math.inf) | (t > 1e4), 0) for t in leaves]
    own = [t.to(dtype) if n < 3 or dtype == torch.float64 else t for n, t in enumerate(own)]
    own = [t.requires_grad_(leaf.requires_grad) for t, leaf in zip(own, leaves, strict=True)]
    rest = iter(own[3:])
    options = options | {name: next(rest) for name in LEARNED if options.get(name) is not None}
    if dtype == torch.float64 and options.get("alibi_slopes") is not None:
        options["alibi_slopes"] = options["alibi_slopes"].double()
    return own, options


def assert_matches(
    inputs: Sequence[Tensor],
    options: Mapping[str, Any],
    *,
    backend: str = "triton",
    trains: bool = True,
    keep: Tensor | None = None,
    poisoned_rows: Tensor | None = None,
    lse_weight: float = 1.0,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Hold output, logsumexp and all gradients, through both of them at once, to the error rule.

    Args:
        inputs: q, k and v, leaves; NaN, inf or numbers above 1e4 where nobody may look.
        options: of `attention`; sinks and bias are leaves too.
        keep: what dropout left, where the call drops.
        poisoned_rows: rows of the output, bool `[B, Hq, Sq]`, at which NaN arrives in the backward.
        lse_weight: size of the gradient that arrives at the logsumexp.

    Returns:
        Output, logsumexp and gradients of q, k, v, then of sinks and bias where given.
    """
    leaves = [*inputs, *(options[name] for name in LEARNED if options.get(name) is not None)]
    with torch.set_grad_enabled(trains):
        out, lse = ops.attention(*inputs, **options, return_lse=True, backend=backend)
    exact, exact_options = as_others(torch.float64, leaves, options)
    own, own_options = as_others(inputs[0].dtype, leaves, options)
    visible = visible_in(inputs[0], inputs[1], options)
    if keep is None:
        true, true_lse = ops.attention(*exact[:3], **exact_options, return_lse=True, backend="reference")
    else:
        true, true_lse = plain(*exact[:3], visible, exact_options, keep)
    simple, simple_lse = plain(*own[:3], visible, own_options, keep)

    blind = ~visible.any(-1)
    assert out.shape == true.shape and (out[blind] == 0).all() and (lse[blind] == -math.inf).all()
    assert lse.dtype == torch.float32
    assert_as_accurate("out", out, simple, true)
    finite = [t.masked_fill(blind, 0) for t in (lse, simple_lse, true_lse)]
    assert_as_accurate("lse", *finite)
    if not trains:
        return out, lse, ()

    d_out, d_lse = torch.randn_like(out), (lse_weight * torch.randn_like(lse)).masked_fill(blind, 0)
    arriving = (d_out, d_lse)
    if poisoned_rows is not None:
        arriving = (d_out.masked_fill(poisoned_rows[..., None], math.nan), d_lse.masked_fill(poisoned_rows, math.nan))
    grads = torch.autograd.grad((out, lse), leaves, arriving)
    theirs = torch.autograd.grad((simple, simple_lse), own, (d_out, d_lse))
    trues = torch.autograd.grad((true, true_lse), exact, (d_out.double(), d_lse.double()))
    assert (grads[0][blind] == 0).all()
    names = ("dq", "dk", "dv", *(f"d_{name}" for name in LEARNED if options.get(name) is not None))
    for name, mine, other, truth in zip(names, grads, theirs, trues, strict=True):
        assert_as_accurate(name, mine, other.to(mine.dtype), truth.reshape(mine.shape))
    return out, lse, grads
