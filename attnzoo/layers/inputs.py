"""What layers ask of their inputs, and the small tensors they make of lengths and boundaries."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.caches import Cache
from attnzoo.layers.rope import RotaryEmbedding
from attnzoo.masks import Mask
from attnzoo.ops.decoding.reach import reach

_INTEGERS = (torch.int64, torch.int32)


def check_sizes(
    dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int | None,
    mask: Mask | None,
    rope: RotaryEmbedding | None,
    dropout: float,
) -> None:
    """ValueError for a layer that cannot be built."""
    for name, size in (("dim", dim), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
    if head_dim is None and dim % num_heads:
        raise ValueError(f"dim is {dim}, which num_heads ({num_heads}) does not divide; give head_dim")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads is {num_kv_heads}; it must divide num_heads ({num_heads})")
    if mask is not None and not isinstance(mask, Mask):
        raise ValueError(f"mask is a {type(mask).__name__}; it must be an attnzoo.masks.Mask or None")
    if mask is not None and mask.heads not in (None, num_heads):
        raise ValueError(f"mask is made for {mask.heads} heads; num_heads is {num_heads}")
    size = dim // num_heads if head_dim is None else head_dim
    if rope is not None and rope.head_dim != size:
        raise ValueError(f"rope has head_dim {rope.head_dim}; the layer's is {size}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must be in [0, 1)")


def check_inputs(
    dim: int,
    x: Tensor,
    context: Tensor | None,
    positions: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    cached: bool,
) -> None:
    """ValueError for inputs of a forward that do not fit the layer or one another."""
    for name, given in (("x", x), ("context", context)):
        if given is not None and (given.dim() != 3 or given.shape[2] != dim):
            raise ValueError(f"{name} has shape {list(given.shape)}; it must be [B, S, {dim}]")
    batch, length = x.shape[:2]
    if context is not None and context.shape[0] != batch:
        raise ValueError(f"context has batch {context.shape[0]}; x has {batch}")
    if context is not None and positions is not None:
        raise ValueError("positions given with context; cross-attention has no positions")
    if positions is not None:
        allowed = ([length], [1, length], [batch, length])
        if list(positions.shape) not in allowed or positions.dtype not in _INTEGERS:
            raise ValueError(
                f"positions is {positions.dtype} of shape {list(positions.shape)}; "
                f"it must be int64 or int32 of shape [{length}] or [{batch}, {length}]"
            )
    if cu_seqlens is not None:
        _check_packed(cu_seqlens, batch)
        for name, other in (
            ("context", context is not None),
            ("key_lengths", key_lengths is not None),
            ("cache", cached),
        ):
            if other:
                raise ValueError(f"{name} given with cu_seqlens; packed documents take none")
    if key_lengths is not None:
        _check_lengths(key_lengths, batch, length if context is None else context.shape[1])


def check_cache(cache: Cache, batch: int, num_kv_heads: int, head_dim: int) -> None:
    """ValueError for a cache of another layer's shape or another batch."""
    allowed = (batch, num_kv_heads, head_dim, head_dim)
    if (cache.batch_size, cache.num_kv_heads, cache.head_dim, cache.v_head_dim) != allowed:
        raise ValueError(
            f"cache is made for batch {cache.batch_size}, {cache.num_kv_heads} heads of {cache.head_dim} (keys) and "
            f"{cache.v_head_dim} (values); here are batch {batch}, {num_kv_heads} heads of {head_dim}"
        )


def check_reach(cache: Cache, mask: Mask | None) -> None:
    """ValueError for a cache that drops keys which the mask lets a query see."""
    if cache.reach is None:
        return
    far = reach(mask, cache.prefix)
    if far is None or far > cache.reach:
        sees = "any key before it" if far is None else f"{far} keys up to its own"
        raise ValueError(f"cache holds what a query needs to see {cache.reach} keys; with mask {mask} it sees {sees}")


def check_positions(positions: Tensor, key_lengths: Tensor | None, cache: Cache) -> None:
    """ValueError for positions that do not rise along a row's tokens, as a cache takes them; on the CPU only."""
    if positions.device.type != "cpu" or torch.compiler.is_compiling():
        return
    at, before = positions.expand(cache.batch_size, -1), cache.lengths.unsqueeze(1)
    # Where the cache's positions rose from 0 or more, what is less than their number goes back behind the last of them.
    back = torch.cat([at[:, :1] < before, at.diff(dim=1) <= 0], dim=1)
    if key_lengths is not None:
        back &= torch.arange(at.shape[1]) < key_lengths.unsqueeze(1)
    if back.any():
        row, token = back.nonzero()[0].tolist()
        raise ValueError(
            f"positions go back: row {row} has {at[row].tolist()} after {int(before[row])} tokens in the cache; "
            f"they must rise from token to token (token {token} does not)"
        )


def packed_positions(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Each token's place in its document, and that document's length, both `[length]`."""
    at = torch.arange(length, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), at, right=True).clamp(max=len(cu_seqlens) - 2)
    return at - cu_seqlens[document], cu_seqlens.diff()[document]


def zero_padding(x: Tensor, key_lengths: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """`x [B, S, dim]` with 0 in its padding, so that what stands there, NaN included, reaches no output or gradient."""
    if key_lengths is None and cu_seqlens is None:
        return x
    ends = key_lengths[:, None] if key_lengths is not None else cu_seqlens[-1]  # type: ignore[index]
    return x.masked_fill((torch.arange(x.shape[1], device=x.device) >= ends).unsqueeze(-1), 0)


def _check_packed(cu_seqlens: Tensor, batch: int) -> None:
    if batch != 1:
        raise ValueError(f"cu_seqlens given with batch {batch}; packed documents lie in one row, batch 1")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in _INTEGERS:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}; "
            "it must be int32 of shape [documents + 1]"
        )


def _check_lengths(key_lengths: Tensor, batch: int, length: int) -> None:
    if key_lengths.shape != (batch,) or key_lengths.dtype not in _INTEGERS:
        raise ValueError(
            f"key_lengths is {key_lengths.dtype} of shape {list(key_lengths.shape)}; "
            f"it must be int64 or int32 of shape [{batch}]"
        )
    # Elsewhere than on a CPU, looking at values means a wait for the device in every layer of every step.
    if key_lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        values = key_lengths.tolist()
        if any(not 0 <= value <= length for value in values):
            raise ValueError(f"key_lengths is {values}; each must be from 0 to {length}")
