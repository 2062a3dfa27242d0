"""What is minimised. An objective gives the sum over target tokens; the mean is taken over a whole step."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recipes.packed import IGNORED, Batch, forward_packed, shifted_labels


class Objective(Protocol):
    """`objective(model, batch)` is the loss summed over the batch's target tokens, a scalar in fp32."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor: ...


class NextToken:
    """Cross-entropy of each next token, in nats; the softmax is computed in fp32.

    Args:
        chunk_tokens: how many tokens' logits are held in fp32 at once; the backward pass makes them again.
    """

    def __init__(self, chunk_tokens: int = 1024) -> None:
        if chunk_tokens < 1:
            raise ValueError(f"objective.chunk_tokens must be at least 1, got {chunk_tokens}")
        self.chunk_tokens = chunk_tokens

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = forward_packed(model, batch)[0]  # [T, V]
        targets = shifted_labels(batch)  # [T]
        total = torch.zeros((), device=logits.device)
        for start in range(0, len(targets), self.chunk_tokens):
            piece = slice(start, start + self.chunk_tokens)
            total = total + checkpoint(_cross_entropy, logits[piece], targets[piece], use_reentrant=False)
        return total


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
