"""Packed batches: documents side by side in one row, none of which sees another, and what runs a model on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # the label of a token that nothing predicts: the first of each document's piece

# input_ids [1, T] int64; labels [1, T], the same with IGNORED at the first token of each piece; position_ids [1, T],
# from 0 in each piece; cu_seqlens [N + 1] int32, where the pieces begin and the last one ends.
Batch = Mapping[str, Tensor]

# Attention implementations that read the documents' boundaries from the keyword arguments below.
TAKES_BOUNDARIES = {"attnzoo", "flash_attention_2", "flash_attention_3", "flash_attention_4"}


def pack(pieces: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """One batch of pieces of documents, each a 1-D array of token ids. No pieces give a token that trains nothing."""
    filler = [] if pieces else [np.zeros(1, dtype=np.int64)]
    lengths = [len(piece) for piece in [*pieces, *filler]]
    input_ids = torch.from_numpy(np.concatenate([*pieces, *filler]).astype(np.int64))
    boundaries = torch.tensor([0, *lengths]).cumsum(0)
    labels = input_ids.clone()
    labels[boundaries[:-1]] = IGNORED
    return {
        "input_ids": input_ids[None],
        "labels": labels[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seqlens": boundaries.to(torch.int32),
    }


def forward_packed(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [1, T, vocabulary] of a packed batch, every document read by itself.

    A model whose attention takes the boundaries gets the batch as it is; any other gets one piece after the other.
    The batch lies on the model's device.
    """
    if getattr(model.config, "_attn_implementation", None) in TAKES_BOUNDARIES:
        return model(**packed_inputs(batch)).logits
    starts = batch["cu_seqlens"].tolist()
    pieces = [batch["input_ids"][:, start:end] for start, end in pairwise(starts)]
    return torch.cat([model(input_ids=piece, use_cache=False).logits for piece in pieces], dim=1)


def packed_inputs(batch: Batch) -> dict[str, Any]:
    """The keyword arguments by which transformers hands a packed batch to its attention."""
    boundaries = batch["cu_seqlens"]
    longest = int(boundaries.diff().max())
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
        "use_cache": False,
    }


def shifted_labels(batch: Batch) -> Tensor:
    """int64 [T]: at each position the token that comes next, IGNORED where a document's piece ends."""
    return F.pad(batch["labels"][0, 1:], (0, 1), value=IGNORED)


def count_targets(batch: Batch) -> Tensor:
    """int64 scalar: how many tokens of the batch are predicted."""
    return (shifted_labels(batch) != IGNORED).sum()
