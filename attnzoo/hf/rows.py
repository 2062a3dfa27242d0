"""Padding and packing for layers that read tokens in order: from the model's mask to rows of real tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing

from attnzoo.hf.attention import boundaries, document_numbers, visible_of

Tables = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Rows:
    """How a batch is laid out: padding on any side goes behind the real tokens, packed documents into one row."""

    shape: tuple[int, int]  # B, S of the model's batch
    order: Tensor | None = None  # [B, S]: which token of its row stands at each place
    lengths: Tensor | None = None  # [B] int64: real tokens in each row
    cu_seqlens: Tensor | None = None  # [N + 1]: of the flattened batch

    def lay(self, x: Tensor) -> Tensor:
        """`x [B, S, ...]` as the layer computes it, or `[1, B * S, ...]` for packed documents."""
        if self.cu_seqlens is not None:
            return x.expand(self.shape[0], *x.shape[1:]).flatten(0, 1).unsqueeze(0)
        if self.order is None:
            return x
        x = x.expand(self.shape[0], *x.shape[1:])
        return x.take_along_dim(self.order.unsqueeze(-1), dim=1)

    def lay_tables(self, tables: Tables) -> Tables:
        """Cosines and sines `[1 | B, S, R]`, laid out with the tokens; the half of each that both halves repeat."""
        if tables is None:
            return None
        cos, sin = (self.lay(table[..., : table.shape[-1] // 2]) for table in tables)
        return cos, sin

    def restore(self, out: Tensor) -> Tensor:
        """The way back, of the layer's result."""
        if self.cu_seqlens is not None:
            return out.squeeze(0).unflatten(0, self.shape)
        if self.order is None:
            return out
        return out.take_along_dim(self.order.argsort(dim=1).unsqueeze(-1), dim=1)


def read_rows(
    mask: Tensor | None, shape: tuple[int, int], seen: int, *, causal: bool, cu_seqlens: Tensor | None = None
) -> Rows:
    """The layout that a mask of `attnzoo_mask` describes. Reading it waits for the device where there is padding.

    Args:
        mask: None, int32 `[B, 1, 1, n]`, or a 4-D bool or additive mask. A token is real if it sees itself.
        shape: B and S of the new tokens.
        seen: tokens of each row before them.
        causal: whether a token sees itself and those before it only.
        cu_seqlens: boundaries of packed documents in the flattened batch.

    Raises:
        ValueError: for a mask that hides more than padding and later tokens (looked for on the CPU).
    """
    if cu_seqlens is not None:
        return Rows(shape, cu_seqlens=cu_seqlens)
    if mask is None:
        return Rows(shape)
    if not (mask.dtype == torch.bool or mask.is_floating_point()):
        documents = document_numbers(mask, shape[1])
        packed = bool(documents.any())
        return Rows(shape, cu_seqlens=boundaries(documents) if packed else None)
    visible = visible_of(mask)
    new = torch.arange(shape[1], device=mask.device)
    real = visible[:, 0, new, new + seen].expand(shape)  # [B, S]
    if not is_tracing(mask):
        if mask.device.type == "cpu" and not _only_padding(visible, real, seen, causal):
            raise ValueError(
                "attention_mask hides more than padding and later tokens, and linear attention can hide nothing else"
            )
        if bool(real.all()):
            return Rows(shape)
    order = real.logical_not().to(torch.int8).argsort(dim=1, stable=True)
    return Rows(shape, order=order, lengths=real.sum(dim=1))


def _only_padding(visible: Tensor, real: Tensor, seen: int, causal: bool) -> bool:
    """Whether each real token sees as many of the new tokens as are real (and not later)."""
    counts = visible[:, 0, :, seen : seen + real.shape[1]].sum(-1)  # [B, S]
    want = real.cumsum(1) if causal else real.sum(1, keepdim=True).expand_as(counts)
    return bool(((counts == want) | ~real).all())
