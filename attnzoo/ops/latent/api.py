"""Attention of the newest tokens over a cache of latents, in the latents' own space (absorbed MLA)."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from attnzoo.masks import Full, Mask
from attnzoo.ops.decoding import KeyValues, Stored, check_last, check_reach, choose, explained, stored
from attnzoo.ops.latent import attend, reference, triton
from attnzoo.ops.latent.common import Call

_BACKENDS: dict[str, ModuleType] = {"triton": triton, "attention": attend, "reference": reference}  # fastest first
_FULL = Full()


def latent_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: KeyValues,
    *,
    scale: float,
    mask: Mask | None = None,
    starts: int | Tensor | None = None,
    backend: str = "auto",
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
        backend: "auto", "triton" (a kernel over every kind of cache; up to 16 queries, no gradients), "attention"
            (`ops.attention` over the cache's view) or "reference".

    Returns:
        `[B, H, Sq, R]`, of q_latent's dtype, still to be up-projected to values; a query that sees no token gives 0.

    Raises:
        ValueError: for shapes that do not fit the cache, queries that are not the last tokens of the cache, a mask
            that reaches further back than the cache has kept tokens, or a backend that cannot run the call, with its
            reasons.
    """
    call = _call(q_latent, q_rope, cache, scale, mask, starts)
    return choose(_BACKENDS, call, q_latent.device, backend).run(call)


def explain_latent_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: KeyValues,
    *,
    scale: float,
    mask: Mask | None = None,
    starts: int | Tensor | None = None,
) -> str:
    """Which backend `latent_decode` would run for this call, and why each other one would not; a line each."""
    return explained(_BACKENDS, _call(q_latent, q_rope, cache, scale, mask, starts), q_latent.device)


def _call(
    q_latent: Tensor, q_rope: Tensor, cache: KeyValues, scale: float, mask: Mask | None, starts: int | Tensor | None
) -> Call:
    """The call, validated and with its defaults filled in."""
    held, q_len = stored(cache), q_latent.shape[2] if q_latent.dim() == 4 else 0
    _check(q_latent, q_rope, held, starts)
    mask = _FULL if mask is None else mask
    check_reach(mask, q_len, cache)
    if starts is None:
        starts = cache.length - q_len if cache.uniform else cache.lengths - q_len
    if isinstance(starts, int):
        check_last(starts, q_len, cache.length)
    return Call(q_latent, q_rope, cache, held, mask, scale, starts)


def _check(q_latent: Tensor, q_rope: Tensor, held: Stored, starts: int | Tensor | None) -> None:
    batch, heads = held.batch, held.heads
    if heads != 1:
        raise ValueError(f"cache holds {heads} heads; latents are one head for all")
    first = q_latent.shape
    for name, shape, size in (("q_latent", first, held.k[0].shape[3]), ("q_rope", q_rope.shape, held.v[0].shape[3])):
        if len(shape) != 4 or shape[:3] != first[:3] or shape[0] != batch or shape[3] != size:
            raise ValueError(
                f"{name} has shape {list(shape)}; with q_latent {list(first)} and this cache it must "
                f"be [{batch}, heads, queries, {size}]"
            )
    if isinstance(starts, Tensor) and starts.shape != (batch,):
        raise ValueError(f"starts has shape {list(starts.shape)}; it must be [{batch}]")
