"""The operator that PyTorch sees, forward and backward: opaque to torch.compile, differentiable, vmappable."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnzoo.masks import Full
from attnzoo.ops.eager import with_shortcut
from attnzoo.ops.launching import is_plain
from attnzoo.ops.softmax.common import mask_from_text
from attnzoo.ops.softmax.triton import launch
from attnzoo.ops.softmax.triton.handed import empty_as
from attnzoo.ops.softmax.triton.shapes import Arguments
from attnzoo.ops.softmax.triton.vmap import backward_rule, forward_rule


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    dense: Tensor | None,
    key_lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    mask: str,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The forward. `mask` is a mask's `text`, or empty where `dense` is given; `softcap` 0 means none."""
    tensors = (q, k, v, sinks, bias, slopes, dense, key_lengths, cu_q, cu_k, seed)
    return launch.forward(_arguments(*tensors, mask, scale, softcap, dropout_p))


def _differentiate(
    d_out: Tensor,
    d_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    dense: Tensor | None,
    key_lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    mask: str,
    scale: float,
    softcap: float,
    dropout_p: float,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the sinks and the bias; the last two are empty where there are none."""
    tensors = (q, k, v, sinks, bias, slopes, dense, key_lengths, cu_q, cu_k, seed)
    x = _arguments(*tensors, mask, scale, softcap, dropout_p)
    d_lse = None if d_lse is None else d_lse.contiguous()  # that of a sum is one number, expanded
    d_q, d_k, d_v, lse2, delta = launch.backward(d_out, d_lse, out, lse, x)
    d_sinks = q.new_empty(0, dtype=torch.float32)
    if sinks is not None:
        share = torch.exp2(sinks.float()[:, None] * math.log2(math.e) - lse2)  # of each row's softmax
        d_sinks = -(share * delta).sum((0, 2))
    d_bias = q.new_empty(0)
    if bias is not None and bias_gradient:
        d_bias = launch.bias_gradient(d_out, lse, delta, x, bias.shape)
    return d_q, d_k, d_v, d_sinks, d_bias


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    dense: Tensor | None,
    key_lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    mask: str,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> Arguments:
    full = (*q.shape[:3], k.shape[2])
    bias, dense = (None if t is None else t.expand(full) for t in (bias, dense))
    rule = mask_from_text(mask) if mask else Full()
    # Kernels read these one number after another, and may be handed views with other strides.
    sinks, key_lengths, cu_q, cu_k = (None if t is None else t.contiguous() for t in (sinks, key_lengths, cu_q, cu_k))
    slopes = None if slopes is None else slopes.float().contiguous()
    tensors = (q, k, v, sinks, bias, slopes, dense, key_lengths, cu_q, cu_k, seed)
    return Arguments(*tensors, rule, scale, softcap or None, dropout_p)


fused_attention = torch.library.custom_op("attnzoo::fused_attention", _forward, mutates_args=())
fused_attention_backward = torch.library.custom_op("attnzoo::fused_attention_backward", _differentiate, mutates_args=())


@fused_attention.register_fake
def _(q, k, v, *rest):  # type: ignore[no-untyped-def]
    return empty_as(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@fused_attention_backward.register_fake
def _(d_out, d_lse, out, lse, q, k, v, sinks, bias, *rest):  # type: ignore[no-untyped-def]
    d_sinks = q.new_empty(0 if sinks is None else sinks.shape[0], dtype=torch.float32)
    d_bias = q.new_empty(0) if bias is None or not rest[-1] else bias.new_empty(bias.shape)
    return empty_as(q), empty_as(k), empty_as(v), d_sinks, d_bias


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:11])
    ctx.rest = inputs[11:]


def _backward(ctx, d_out, d_lse, differentiate=fused_attention_backward):  # type: ignore[no-untyped-def]
    out, lse, *inputs = ctx.saved_tensors
    sinks, bias = inputs[3:5]
    if d_out is None:
        d_out = torch.zeros_like(out)
    wanted = bias is not None and ctx.needs_input_grad[4]
    d_q, d_k, d_v, d_sinks, d_bias = differentiate(d_out, d_lse, out, lse, *inputs, *ctx.rest, wanted)
    d_sinks = None if sinks is None else d_sinks.to(sinks.dtype)
    return d_q, d_k, d_v, d_sinks, d_bias if wanted else None, *([None] * 10)


def _eager_backward(ctx, d_out, d_lse):  # type: ignore[no-untyped-def]
    # `torch.vmap` over a backward hands in many gradients as one tensor, which the operator knows how to run.
    plain = is_plain(d_lse if d_out is None else d_out)
    return _backward(ctx, d_out, d_lse, _differentiate if plain else fused_attention_backward)


fused_attention.register_autograd(_backward, setup_context=_save)
fused_attention.register_vmap(forward_rule(fused_attention))
fused_attention_backward.register_vmap(backward_rule(fused_attention_backward))
attend = with_shortcut(fused_attention, _forward, _save, _eager_backward)
