"""From stored latents to the kernel, which is imported when it first runs, and the custom operator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from attnzoo.ops.decoding.triton.op import merging_for, parts_for, three
from attnzoo.ops.decoding.triton.plan import (
    fitted,
    merge_constants,
    merge_for,
    next_power_of_two,
    shared_memory,
    splits_for,
)
from attnzoo.ops.latent.triton.plan import HOPPER, tiles_for
from attnzoo.ops.launcher import Launcher
from attnzoo.ops.launching import capability, interpreted, num_multiprocessors


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
    index, itemsize = q.device.index, q.element_size()
    strides = (
        *(*q.stride()[:3], *q_rope.stride()[:3]),
        *(latent[0].stride(0), latent[0].stride(2), rope_key[0].stride(0), rope_key[0].stride(2)),
    )
    hopper = suits_hopper(q, q_rope, latent, rope_key, strides)
    if hopper:
        tiles = HOPPER
    else:
        room = shared_memory(index)
        tiles = tiles_for(rows, rank, itemsize, len(latent) > 1, room)
        width = (rank + rope) * itemsize  # codes are converted into memory of their own
        tiles = fitted(tiles, width, width, room)
    m_tiles = -(-rows // tiles.block_m)
    reach = min(longest, back + ahead + q_len)
    splits = splits_for(batch * m_tiles, -(-reach // tiles.block_n), num_multiprocessors(index) * tiles.resident)
    part = parts_for(out, splits)
    grid = m_tiles, splits, batch
    numbers = (*shared, back, ahead, scale, splits, size)
    table_width = 0 if table is None else table.stride(0)
    constants = {
        "HEADS": heads,
        "Q_LEN": q_len,
        "RANK": rank,
        "ROPE": rope,
        "SPLIT": splits > 1,
        "PAGE": 0 if table is None else size,
        "RING": ring,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
    }
    if hopper:
        held = (latent[0], rope_key[0], table, lengths, starts, kept)
        launcher("hopper")(
            grid, (q, q_rope, *held, out, part, *numbers, table_width, *strides), constants, num_warps=tiles.num_warps
        )
        if part is not None:
            merging = merge_constants(merge_for(1, splits, rank, 4))
            launcher("merge")((out.numel() // rank, 1, 1), (part, out, splits), {"DV": rank, **merging}, num_warps=4)
        return out
    arrived, merging = merging_for(part, splits, batch * m_tiles, min(rows, tiles.block_m), rank, tiles.num_warps)
    launcher("latent")(
        grid,
        (
            *(q, q_rope, *three(latent), *three(rope_key), *(recent or (None, None))),
            *(table, lengths, starts, kept, out, part, arrived),
            *(*numbers, recent[0].shape[2] if recent else 0, table_width, *strides),
        ),
        {
            **constants,
            "QUANT": len(latent) - 1,
            "RECENT": len(recent) > 0,
            "BLOCK_R": max(next_power_of_two(rank), 16),
            "BLOCK_P": max(next_power_of_two(rope), 16),
            **merging,
            "PRECISION": "ieee",
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out


def suits_hopper(
    q: Tensor, q_rope: Tensor, latent: Sequence[Tensor], rope_key: Sequence[Tensor], strides: Sequence[int]
) -> bool:
    """Whether the kernel of Hopper GPUs takes the call: many heads, DeepSeek's sizes, and copies of 16 bytes."""
    return (
        q.shape[1] * q.shape[2] > 32
        and q.shape[3] == 512
        and q_rope.shape[3] == 64
        and len(latent) == 1
        and q.element_size() == 2
        and q.device.type == "cuda"
        and not interpreted()
        and capability(q.device.index) == (9, 0)
        and all(stride % 16 == 0 or stride == 1 for stride in strides)
        and all(x.data_ptr() % 16 == 0 for x in (q, q_rope, latent[0], rope_key[0]))
    )


latent_op = torch.library.custom_op("attnzoo::latent_decode", latent_decode, mutates_args=())


@lru_cache(maxsize=3)
def launcher(name: str) -> Launcher:
    """The launcher of a kernel; Triton is imported here, at the first use."""
    if name == "hopper":
        from attnzoo.ops.latent.triton.hopper import hopper_kernel

        return Launcher(hopper_kernel)
    from attnzoo.ops.decoding.triton.merging import merge_kernel
    from attnzoo.ops.latent.triton.kernels import latent_kernel

    return Launcher({"latent": latent_kernel, "merge": merge_kernel}[name])


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
