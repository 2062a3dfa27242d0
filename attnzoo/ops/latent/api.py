"""Attention of the newest tokens over a cache of latents, in the latents' own space (absorbed MLA)."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.masks import Mask
from attnzoo.ops.decoding.api import KeyValues, decode
from attnzoo.ops.latent.common import Held


def latent_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: KeyValues,
    *,
    scale: float,
    mask: Mask | None = None,
    starts: int | Tensor | None = None,
) -> Tensor:
    """Attend from the tokens appended last to every latent in the cache (DeepSeek-V2, arXiv 2405.04434, section 2.1).

        out[h] = softmax(scale * (q_latent[h] latent^T + q_rope[h] rope_key^T)) latent

    It is attention with one key/value head for all query heads, of size R + Dr, whose values are the first R numbers
    of its keys; neither is repeated or, over an `attnzoo.caches.LatentCache`, copied. Row b's query i stands at
    position `starts[b] + i`. What lies past a row's own length is never read into a result, whatever it holds. Memory
    is linear in the length of the cache.

    Args:
        q_latent: `[B, H, Sq, R]`, queries with the keys' up-projection absorbed; R is `kv_lora_rank`.
        q_rope: `[B, H, Sq, Dr]`, rotated queries; Dr is `qk_rope_head_dim`.
        cache: latents `[B, 1, n, R]` in the place of keys, rope keys `[B, 1, n, Dr]` in the place of values, those of
            the queries' own tokens among them. After a chunk into a rolling cache, what its `extend` returned.
        scale: of the scores. It has no default: the size of the heads before the absorption is not known here.
        mask: by absolute positions; None: every token of the row is visible.
        starts: position of each row's first query, one for all or `[B]` int64: the lengths before the append. None:
            the lengths less Sq. Needed where an append was padded, and then queries past a row's end give 0.

    Returns:
        `[B, H, Sq, R]`, of q_latent's dtype, still to be up-projected to values; a query that sees no token gives 0.

    Raises:
        ValueError: for shapes that do not fit the cache, queries that are not the last tokens of the cache, or a mask
            that reaches further back than the cache has kept tokens.
    """
    _check(q_latent, q_rope, cache)
    rank = q_latent.shape[-1]
    keys = cache.joint() if hasattr(cache, "joint") else torch.cat(cache.view(), dim=-1)
    # The values stay as wide as the keys, without a copy: PyTorch's fused kernels take no others.
    held = Held(cache, keys, keys)
    out = decode(torch.cat([q_latent, q_rope], dim=-1), held, mask=mask, scale=scale, starts=starts)
    return out[..., :rank]


def _check(q_latent: Tensor, q_rope: Tensor, cache: KeyValues) -> None:
    latent, rope_key = cache.view()
    if latent.shape[1] != 1:
        raise ValueError(f"cache holds {latent.shape[1]} heads; latents are one head for all")
    for name, given, size in (("q_latent", q_latent, latent.shape[3]), ("q_rope", q_rope, rope_key.shape[3])):
        fits = given.dim() == 4 and given.shape[:3] == q_latent.shape[:3]
        if not fits or given.shape[0] != latent.shape[0] or given.shape[3] != size:
            raise ValueError(
                f"{name} has shape {list(given.shape)}; with q_latent {list(q_latent.shape)} and this cache it must "
                f"be [{latent.shape[0]}, heads, queries, {size}]"
            )
