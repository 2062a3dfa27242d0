"""The custom operator around the kernel, which is imported when it first runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo.ops.decoding.triton.op import merge, parts_of
from attnzoo.ops.decoding.triton.plan import next_power_of_two, splits_for
from attnzoo.ops.latent.triton.plan import tiles_for
from attnzoo.ops.launching import num_multiprocessors


@torch.library.custom_op("attnzoo::latent_decode", mutates_args=())
def latent_op(
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
    from attnzoo.ops.latent.triton import kernels

    batch, heads, q_len, rank = q.shape
    rope = q_rope.shape[3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    rows = heads * q_len
    tiles = tiles_for(rows, rank, q.element_size(), len(latent) > 1)
    m_tiles = -(-rows // tiles.block_m)
    reach = min(longest, back + ahead + q_len)
    slots = num_multiprocessors(q.device.index) * tiles.resident
    splits = splits_for(batch * m_tiles, -(-reach // tiles.block_n), slots)
    part = lse = None
    if splits > 1:
        part = q.new_empty(batch, heads, q_len, splits, rank, dtype=torch.float32)
        lse = q.new_empty(batch, heads, q_len, splits, dtype=torch.float32)
    kernels.latent_kernel[(m_tiles, splits, batch)](
        q,
        q_rope,
        *parts_of(latent),
        *parts_of(rope_key),
        *(recent or (None, None)),
        table,
        lengths,
        starts,
        kept,
        out,
        part,
        lse,
        *shared,
        back,
        ahead,
        latent[0].shape[2],
        recent[0].shape[2] if recent else 0,
        0 if table is None else table.stride(0),
        *q.stride()[:3],
        *q_rope.stride()[:3],
        latent[0].stride(0),
        latent[0].stride(2),
        rope_key[0].stride(0),
        rope_key[0].stride(2),
        scale,
        splits,
        HEADS=heads,
        Q_LEN=q_len,
        RANK=rank,
        ROPE=rope,
        SPLIT=splits > 1,
        PAGE=0 if table is None else latent[0].shape[2],
        RING=ring,
        QUANT=len(latent) - 1,
        RECENT=len(recent) > 0,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_R=max(next_power_of_two(rank), 16),
        BLOCK_P=max(next_power_of_two(rope), 16),
        PRECISION="ieee",
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if part is not None and lse is not None:
        merge(part, lse, None, out)
    return out


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
