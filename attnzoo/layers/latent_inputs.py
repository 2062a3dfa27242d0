"""What latent attention asks of its sizes and caches, its default scale, and which of its forms costs less."""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch import Tensor

from attnzoo.caches import Cache
from attnzoo.layers.rope import RotaryEmbedding
from attnzoo.masks import Mask

Form = Literal["auto", "materialised", "absorbed"]


def check_latent_sizes(
    sizes: dict[str, int | None], mask: Mask | None, rope: RotaryEmbedding | None, dropout: float
) -> None:
    """ValueError for a layer that cannot be built. `sizes` are those of its constructor, by name."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
    rope_dim = sizes["qk_rope_head_dim"]
    if rope_dim is not None and rope_dim % 2:
        raise ValueError(f"qk_rope_head_dim is {rope_dim}; it must be even, for its dimensions rotate in pairs")
    if mask is not None and not isinstance(mask, Mask):
        raise ValueError(f"mask is a {type(mask).__name__}; it must be an attnzoo.masks.Mask or None")
    if mask is not None and mask.heads not in (None, sizes["num_heads"]):
        raise ValueError(f"mask is made for {mask.heads} heads; num_heads is {sizes['num_heads']}")
    if rope is not None and rope.head_dim != rope_dim:
        raise ValueError(f"rope has head_dim {rope.head_dim}; the layer's qk_rope_head_dim is {rope_dim}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must be in [0, 1)")


def check_latent_call(
    context: Tensor | None, form: str, cache: Cache | None, allowed: tuple[int, int, int, int], dropout: float
) -> None:
    """ValueError for an unknown form, a context, a cache of another layer or batch, or a cache with dropout.

    `allowed` is the cache's batch, heads, size of latents and size of rope keys.
    """
    if form not in get_args(Form):
        raise ValueError(f"form is {form!r}; allowed are {', '.join(map(repr, get_args(Form)))}")
    if context is not None:
        raise ValueError("context given; latent attention has no cross-attention, for its rope keys are positions")
    if cache is None:
        return
    made = cache.batch_size, cache.num_kv_heads, cache.head_dim, cache.v_head_dim
    if made != allowed:
        raise ValueError(
            f"cache is made for batch {made[0]}, {made[1]} heads of {made[2]} (keys, latents) and {made[3]} (values, "
            f"rope keys); here are batch {allowed[0]}, {allowed[1]} head of {allowed[2]} and {allowed[3]}"
        )
    if dropout > 0:
        raise ValueError(f"cache with dropout {dropout} in training; call eval() first")


def latent_scale(qk_head_dim: int, rope: RotaryEmbedding | None) -> float:
    """`qk_head_dim ** -0.5`, times the square of yarn's magnitude where the rope's scaling has `mscale_all_dim`.

    DeepSeek's way of yarn (arXiv:2309.00071): the part of each key that does not rotate is scaled too.
    """
    scaling = {} if rope is None else rope.scaling
    weight, factor = scaling.get("mscale_all_dim", 0), scaling.get("factor", 1)
    magnitude = 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0
    return qk_head_dim**-0.5 * magnitude**2


def absorbed_costs_less(new: int, total: int, kv_lora_rank: int, qk_nope_head_dim: int, v_head_dim: int) -> bool:
    """Whether `new` queries over `total` tokens in a cache take fewer multiplications in latent space.

    A head and token: the materialised form up-projects all tokens to keys and values, the absorbed one only the new
    ones' queries and outputs, and then pays for scores and sums as wide as the latent.
    """
    up = kv_lora_rank * (qk_nope_head_dim + v_head_dim)
    wider = 2 * kv_lora_rank - qk_nope_head_dim - v_head_dim
    return new * up + new * total * wider <= total * up
