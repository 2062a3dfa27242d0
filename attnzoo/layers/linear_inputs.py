"""What linear attention asks of its decays and of the caches that it is called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attnzoo.caches import Cache, RecurrentStateCache


def decay_of_heads(decay: Sequence[float] | str | None, heads: int) -> tuple[float, ...] | None:
    """What is left of each head's state after a token: as given, or 1 - 2^(-5 - h) for "retnet" (arXiv 2307.08621)."""
    if decay is None:
        return None
    if isinstance(decay, str):
        return tuple(1 - 2.0 ** (-5 - head) for head in range(heads))
    if len(decay) != heads:
        raise ValueError(f"decay has {len(decay)} numbers; there are {heads} key/value heads")
    return tuple(float(value) for value in decay)


def check_state_cache(
    cache: Cache,
    sizes: tuple[int, int, int, int],
    settings: Mapping[str, Any],
    *,
    decays: bool,
    crossed: bool,
) -> RecurrentStateCache:
    """The cache, if it is one for a layer and batch like this; ValueError otherwise.

    Args:
        cache: what the layer was called with.
        sizes: the batch, heads, features and head_dim that it has to have.
        settings: its attributes that have to be equal to the layer's, by name.
        decays: whether the layer's states decay.
        crossed: whether the keys are those of a context.
    """
    if not isinstance(cache, RecurrentStateCache):
        raise ValueError(f"cache is a {type(cache).__name__}; this layer takes a RecurrentStateCache")
    if crossed and cache.rollback:
        raise ValueError(f"cache has rollback {cache.rollback}; one for a context takes none")
    theirs = (cache.batch_size, cache.num_kv_heads, cache.head_dim, cache.v_head_dim)
    if theirs != sizes:
        raise ValueError(f"cache is made for batch, heads, features and head_dim {theirs}; here they are {sizes}")
    for name, here in settings.items():
        if getattr(cache, name) != here:
            raise ValueError(f"cache is made for {name} {getattr(cache, name)!r}; here it is {here!r}")
    if decays == (cache.log_decay is None):
        raise ValueError("cache and layer must both have a decay, or neither")
    return cache
