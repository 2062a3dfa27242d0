"""`attention`: validate the call, choose a backend, run it."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from attnzoo.masks import Mask
from attnzoo.ops.explaining import explanation
from attnzoo.ops.softmax import choice, plans
from attnzoo.ops.softmax.backends import BACKENDS, choose
from attnzoo.ops.softmax.checks import checked_call


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
        call = checked_call(q, k, v, mask, scale, softcap, *options)
        out, lse = choose(call, backend).run(call)
    else:
        out, lse = plans.run(q, k, v, mask, scale, softcap, *options, backend)
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
    call = checked_call(q, k, v, mask, scale, softcap, *options)
    names, source = choice.order(call)
    chosen = choose(call, "auto")

    def could(name: str) -> str:
        return "could run, is slower" if name in names else "could run, if asked for"

    return explanation(BACKENDS, call, chosen, reference="quadratic in memory", could=could, runs=f"runs ({source})")
