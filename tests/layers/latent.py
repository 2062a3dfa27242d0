"""A small latent attention layer and what its tests feed it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from attnzoo.caches import LatentCache
from attnzoo.layers import MultiHeadLatentAttention, RotaryEmbedding

DIM, HEADS, RANK, NOPE, ROPE, VALUE, ROOM = 20, 3, 10, 6, 4, 5, 48
FORMS: tuple[Literal["auto", "materialised", "absorbed"], ...] = ("auto", "materialised", "absorbed")


def make(**options: Any) -> MultiHeadLatentAttention:
    """A small fp64 layer with rotation, whose norms are not all ones."""
    torch.manual_seed(0)
    sizes = {"kv_lora_rank": RANK, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": VALUE}
    options = {"q_lora_rank": 8, "rope": RotaryEmbedding(ROPE, base=100.0, layout="interleaved"), **sizes, **options}
    layer = MultiHeadLatentAttention(DIM, HEADS, **options).double()
    for norm in (layer.kv_a_layernorm, getattr(layer, "q_a_layernorm", None)):
        if isinstance(norm, torch.nn.RMSNorm):
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return layer


def new_cache(batch_size: int, room: int = ROOM, dtype: torch.dtype = torch.float64) -> LatentCache:
    """An empty cache full of NaN, as memory may be that was used before."""
    cache = LatentCache(batch_size, room, RANK, ROPE, dtype=dtype)
    cache.append(*(torch.full((batch_size, 1, room, size), torch.nan, dtype=dtype) for size in (RANK, ROPE)))
    cache.reset()
    return cache


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
