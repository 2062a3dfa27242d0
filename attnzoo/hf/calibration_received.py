"""How much attention each token receives: what a token's key and value are worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_SCORES = 1 << 24  # at once, so that long rows and many heads fit


class Received:
    """`weights` `[rows, S]`: what a token gets of all queries and heads, 1 in the mean; None where it was not seen."""

    weights: Tensor | None = None


@contextmanager
def watching_attention() -> Iterator[Received]:
    """Sees what attention modules hand to transformers' attention functions inside the block.

    Classes that compute attention by themselves (GPT-J, BLOOM) or eagerly are not seen.
    """
    seen = Received()

    def watch(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if not any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux")):
            seen.weights = _received(q, k, mask, kwargs.get("scaling"), causal and mask is None)
        return sdpa_attention_forward(module, q, k, v, mask, **kwargs)

    before = ALL_ATTENTION_FUNCTIONS._local_mapping.get("sdpa")
    ALL_ATTENTION_FUNCTIONS["sdpa"] = watch
    try:
        yield seen
    finally:
        if before is None:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]
        else:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = before


def _received(q: Tensor, k: Tensor, mask: Tensor | None, scaling: float | None, causal: bool) -> Tensor:
    """q `[B, H, S, D]`, k `[B, Hk, S, D]` with their positions in them -> `[B, S]`."""
    rows, heads, length, dim = q.shape
    scaling = dim**-0.5 if scaling is None else scaling
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1) if causal else None
    step = max(1, _SCORES // (length * length))
    total = torch.zeros(rows, length, device=q.device)
    for row in range(rows):
        for first in range(0, heads, step):
            some = slice(first, first + step)
            owners = torch.arange(heads, device=q.device)[some] // (heads // k.shape[1])
            scores = (q[row, some] @ k[row][owners].mT).float() * scaling
            if hidden is not None:
                scores = scores.masked_fill(hidden, float("-inf"))
            if mask is not None:
                at = mask[min(row, len(mask) - 1)]
                at = at[some] if len(at) == heads else at
                scores = scores.masked_fill(~at, float("-inf")) if at.dtype == torch.bool else scores + at
            total[row] += scores.softmax(-1).sum((0, 1))
    return total / heads
