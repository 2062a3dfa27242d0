"""Left padding to right padding and back: caches hold real tokens only, each row from position 0."""

from __future__ import annotations

import torch
from torch import Tensor


def to_right_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """`x [B, S, ...]`, whose rows end with their `lengths[b]` real tokens, with these in front and the padding behind.

    A left-padded batch goes through a layer as `layer(to_right_padding(x, lengths), key_lengths=lengths, cache=cache)`;
    steps after that need nothing, since every row gets the same number of tokens.

    Args:
        x: `[B, S, ...]`.
        lengths: `[B]` integers from 0 to S.
    """
    return _roll(x, x.shape[1] - lengths)


def to_left_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """The way back: `x [B, S, ...]`, whose rows begin with their `lengths[b]` real tokens, with these at the end."""
    return _roll(x, lengths)


def _roll(x: Tensor, by: Tensor) -> Tensor:
    """Row b begins with its token `by[b]`; those before it go to the end."""
    if by.shape != x.shape[:1] or by.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"lengths is {by.dtype} of shape {list(by.shape)}; it must be int64 or int32 of shape [{x.shape[0]}]"
        )
    size = x.shape[1]
    places = (torch.arange(size, device=x.device) + by.unsqueeze(1)) % max(size, 1)  # [B, S]
    return x[torch.arange(x.shape[0], device=x.device).unsqueeze(1), places]
