"""How well a model predicts held-out text: sums over tokens, kept apart by how much of the text came before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.packed import IGNORED, Batch, forward_packed, shifted_labels

CHUNK_TOKENS = 1024  # whose logits are held in fp32 at once
FIRST_BUCKET = 64  # contexts of fewer tokens are counted together; each further bucket is twice as long
BUCKETS = 20


class Scores:
    """Sums over predicted tokens, fp64 [3, buckets] on some device: loss in nats, right guesses, tokens.

    Bucket 0 has the tokens with fewer than 64 tokens of their document before them, bucket b those with
    64 * 2**(b-1) to 64 * 2**b - 1.
    """

    def __init__(self, sums: Tensor) -> None:
        self.sums = sums.cpu()

    @property
    def tokens(self) -> int:
        return int(self.sums[2].sum())

    @property
    def cross_entropy(self) -> float:
        """Nats a token, the mean over all tokens."""
        return float(self.sums[0].sum() / self.sums[2].sum())

    @property
    def accuracy(self) -> float:
        """The part of the tokens that the model held most likely."""
        return float(self.sums[1].sum() / self.sums[2].sum())

    def by_context(self) -> list[dict[str, Any]]:
        """Cross-entropy by the number of tokens before the one that is predicted: first and last of a bucket."""
        rows = []
        for bucket, (loss, _, tokens) in enumerate(self.sums.T.tolist()):
            if tokens:
                first = FIRST_BUCKET << (bucket - 1) if bucket else 1
                last = (FIRST_BUCKET << bucket) - 1
                rows.append({"first": first, "last": last, "cross_entropy": loss / tokens, "tokens": int(tokens)})
        return rows

    def __add__(self, other: Scores) -> Scores:
        return Scores(self.sums + other.sums)


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[Batch], device: torch.device | str) -> Scores:
    """Scores a causal language model, which lies on `device`, on packed batches; nothing waits for the device before
    the end."""
    sums = torch.zeros(3, BUCKETS, dtype=torch.float64, device=device)
    firsts = FIRST_BUCKET << torch.arange(BUCKETS - 1, device=device)  # of the buckets but the first
    for batch in batches:
        batch = {key: value.to(device) for key, value in batch.items()}
        logits = forward_packed(model, batch)[0]  # [T, V]
        context = batch["position_ids"][0] + 1  # of the token that the logits predict
        buckets = torch.bucketize(context, firsts, right=True)
        pieces = [whole.split(CHUNK_TOKENS) for whole in (logits, shifted_labels(batch), buckets)]
        for some, targets, places in zip(*pieces, strict=True):
            sums.index_add_(1, places, _score_chunk(some, targets))
    return Scores(sums)


def _score_chunk(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss, right guesses and 1 of each token, fp64 [3, T]; all 0 where nothing is predicted."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    right = logits.argmax(dim=-1) == targets  # IGNORED is never the most likely token
    return torch.stack([loss.double(), right.double(), (targets != IGNORED).double()])
