"""From stored latents to the kernel, which is imported when it first runs, and the custom operator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from attnzoo.ops.decoding.triton.op import merge, parts_for, starts_early, three
from attnzoo.ops.decoding.triton.plan import fitted, next_power_of_two, shared_memory, splits_for
from attnzoo.ops.latent.triton.plan import tiles_for
from attnzoo.ops.launcher import Launcher
from attnzoo.ops.launching import num_multiprocessors


def latent_decode(
    q: Tensor,
    q_rope: Tensor,
    latent: Sequence[Tensor],
    rope_key: Sequence[Tensor],
    recent: Sequence[Tensor],
    table: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    kept: Tensor | None,
    shared: Sequence[int],
    longest: int,
    back: int,
    ahead: int,
    ring: bool,
    scale: float,
) -> Tensor:
    """Attend from `q [B, H, Sq, R]` and `q_rope [B, H, Sq, Dr]` to latents and rope keys where they are stored.

    Args:
        q, q_rope: their last strides are 1.
        latent, rope_key: vectors, codes and scale, or codes, scale and offset, as `Stored` holds them, of one head.
        recent: rings of the newest latents and rope keys as they came, or nothing.
        table: `[B, pages]` int32.
        lengths, starts, kept: `[B]` integers that are added to `shared`, which holds one number of each for all rows.
        longest: no row has more tokens.
        back, ahead: query i sees token j iff -ahead <= i - j < back.
        ring: whether latents and rope keys are rings.
        scale: of the scores.

    Returns:
        `[B, H, Sq, R]`.
    """
    batch, heads, q_len, rank = q.shape
    rope, size = q_rope.shape[3], latent[0].shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    rows = heads * q_len
    room = shared_memory(q.device.index)
    tiles = tiles_for(rows, rank, q.element_size(), len(latent) > 1, room)
    width = (rank + rope) * q.element_size()  # codes are converted into memory of their own
    tiles = fitted(tiles, width, width, room)
    m_tiles = -(-rows // tiles.block_m)
    reach = min(longest, back + ahead + q_len)
    slots = num_multiprocessors(q.device.index) * tiles.resident
    splits = splits_for(batch * m_tiles, -(-reach // tiles.block_n), slots)
    part, lse = parts_for(out, splits)
    launcher()(
        (m_tiles, splits, batch),
        (
            *(q, q_rope, *three(latent), *three(rope_key), *(recent or (None, None))),
            *(table, lengths, starts, kept, out, part, lse),
            *(*shared, back, ahead, scale, splits),
            *(size, recent[0].shape[2] if recent else 0, 0 if table is None else table.stride(0)),
            *(*q.stride()[:3], *q_rope.stride()[:3]),
            *(latent[0].stride(0), latent[0].stride(2), rope_key[0].stride(0), rope_key[0].stride(2)),
        ),
        {
            "HEADS": heads,
            "Q_LEN": q_len,
            "RANK": rank,
            "ROPE": rope,
            "SPLIT": splits > 1,
            "PAGE": 0 if table is None else size,
            "RING": ring,
            "QUANT": len(latent) - 1,
            "RECENT": len(recent) > 0,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_R": max(next_power_of_two(rank), 16),
            "BLOCK_P": max(next_power_of_two(rope), 16),
            "EARLY": starts_early(q.device),
            "PRECISION": "ieee",
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    merge(part, lse, None, out)
    return out


latent_op = torch.library.custom_op("attnzoo::latent_decode", latent_decode, mutates_args=())


@lru_cache(maxsize=1)
def launcher() -> Launcher:
    """The kernel's launcher; Triton is imported here, at the first use."""
    from attnzoo.ops.latent.triton import kernels

    return Launcher(kernels.latent_kernel)


@latent_op.register_fake
def _(
    q: Tensor,
    q_rope: Tensor,
    latent: Sequence[Tensor],
    rope_key: Sequence[Tensor],
    recent: Sequence[Tensor],
    table: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    kept: Tensor | None,
    shared: Sequence[int],
    longest: int,
    back: int,
    ahead: int,
    ring: bool,
    scale: float,
) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
