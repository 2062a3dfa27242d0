"""Which tokens of a padded batch are real, read from the model's mask, for caches that hold real tokens only."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.hf.attention import document_numbers, visible_of
from attnzoo.hf.rows import Rows
from attnzoo.masks import Mask


def new_rows(mask: Tensor, shape: tuple[int, int], seen: int) -> Rows:
    """How the new tokens are laid out.

    Args:
        mask: int32 `[B, 1, 1, n]`, or a 4-D bool or additive mask whose columns count the padded batch from its start.
        shape: B and S of the new tokens. One token a row is taken to be real, without looking.
        seen: tokens of each row before them, padding included.

    Raises:
        ValueError: for packed documents.
    """
    if not (mask.dtype == torch.bool or mask.is_floating_point()):
        if bool(document_numbers(mask, shape[1]).any()):
            raise ValueError("packed documents came with a cache; give them without one (use_cache=False)")
        return Rows(shape)
    if shape[1] == 1:
        return Rows(shape)
    new = torch.arange(shape[1], device=mask.device)
    real = visible_of(mask)[:, 0, new, new + seen].expand(shape)  # a token is real if it sees itself
    if bool(real.all()):
        return Rows(shape)
    order = real.logical_not().to(torch.int8).argsort(dim=1, stable=True)
    return Rows(shape, order=order, lengths=real.sum(dim=1))


def check_padding(mask: Tensor, rows: Rows, pattern: Mask, seen: int, starts: int | Tensor) -> None:
    """ValueError for a mask that says more of the new tokens than padding and the pattern do.

    It is compared in full, so on the CPU only.

    Args:
        mask, seen: as of `new_rows`.
        rows: what that gave.
        pattern: which query sees which key, by positions of real tokens.
        starts: real tokens of each row before the new ones, one number for all or `[B]`.
    """
    if not (mask.dtype == torch.bool or mask.is_floating_point()):
        return
    batch, new = rows.shape
    visible = visible_of(mask)[:, :, :, seen : seen + new]  # [1 or B, 1 or H, S, S]
    column = torch.arange(new)
    real = torch.ones(batch, new, dtype=torch.bool)
    if rows.order is not None and rows.lengths is not None:
        real = (column < rows.lengths[:, None]).take_along_dim(rows.order.argsort(dim=1), dim=1)
    base = starts[:, None] if isinstance(starts, Tensor) else starts
    place = (real.cumsum(1) - 1).clamp(min=0) + base  # [B, S]
    i, j = place[:, None, :, None], place[:, None, None, :]
    shown = pattern.visible(i, j) & real[:, None, None, :]
    # The layer's own pattern may hide more of the past than the model knows.
    wrong = (shown & ~visible) | (visible & ~shown & (j > i))
    if bool((wrong & real[:, None, :, None]).any()):
        raise ValueError(
            "attention_mask hides or shows other keys than padding and the layer's pattern do; "
            "a cache of attnzoo.hf.cache_for takes no such mask"
        )


def lay(rows: Rows, x: Tensor) -> Tensor:
    """`x [B, H, S, D]` with each row's real tokens first."""
    return x if rows.order is None else x.take_along_dim(rows.order[:, None, :, None], dim=2)


def restore(rows: Rows, x: Tensor) -> Tensor:
    """The way back."""
    return x if rows.order is None else x.take_along_dim(rows.order.argsort(dim=1)[:, None, :, None], dim=2)
