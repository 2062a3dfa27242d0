"""From stored latents to the kernel, which is imported when it first runs, and the custom operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.ops.decoding.triton.counters import counters
from attnzoo.ops.decoding.triton.op import dtypes_of, form_of, merging_for, parts_for, three
from attnzoo.ops.decoding.triton.plan import Tiles, fitted, next_power_of_two, shared_memory, splits_for
from attnzoo.ops.decoding.triton.repeating import Plans, Repeat
from attnzoo.ops.latent.triton.plan import HOPPER, tiles_for
from attnzoo.ops.launcher import Launcher, launcher_of
from attnzoo.ops.launching import capability, interpreted, num_multiprocessors

FEW = 32  # queries of all heads that are too few for the kernel of Hopper GPUs


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
    form = (q.shape, q.stride(), q_rope.shape, q_rope.stride(), q.dtype, q.device)
    # Which kernel runs depends on addresses where there are many heads.
    whole = q.shape[1] * q.shape[2] <= FEW or all(x.data_ptr() % 16 == 0 for x in (q, q_rope, latent[0], rope_key[0]))
    plan = plans.get(
        (
            *(*form, form_of(latent, rope_key, recent), dtypes_of(table, lengths, starts, kept)),
            *(ring, back, ahead, scale, longest < 2**31, whole),
            None if table is None else table.stride(0),
        ),
        lambda: _planned(q, q_rope, latent, rope_key, recent, table, back, ahead, ring, scale),
    )
    out = q.new_empty(q.shape)
    if plan.programs == 0:
        return out
    splits = splits_for(plan.programs, -(-min(longest, plan.reach) // plan.tiles.block_n), plan.slots)
    repeats = plan.repeats.get(splits)
    if repeats is None:
        repeats = plan.repeats[splits] = plan.launch(splits)
    part = parts_for(out, splits) if splits > 1 else None
    if plan.hopper:
        repeats[0]((q, q_rope, latent[0], rope_key[0], table, lengths, starts, kept, out, part), shared)
        if part is not None:
            repeats[1]((part, out), (splits,))
        return out
    arrived = counters(q.device, plan.programs, splits) if splits > 1 else None
    held = (*three(latent), *three(rope_key), *(recent or (None, None)), table)
    repeats[0]((q, q_rope, *held, lengths, starts, kept, out, part, arrived), shared)
    return out


class Plan(NamedTuple):
    """What calls of one form share."""

    hopper: bool  # whether they run the kernel of Hopper GPUs
    tiles: Tiles
    programs: int  # of one split; 0: there is nothing to do
    reach: int  # tokens that the queries of a row see at most
    slots: int  # programs that run at a time
    launch: Callable[[int], tuple[Repeat, ...]]  # by number of splits
    repeats: dict[int, tuple[Repeat, ...]]


plans: Plans[Plan] = Plans()


def _planned(
    q: Tensor,
    q_rope: Tensor,
    latent: Sequence[Tensor],
    rope_key: Sequence[Tensor],
    recent: Sequence[Tensor],
    table: Tensor | None,
    back: int,
    ahead: int,
    ring: bool,
    scale: float,
) -> Plan:
    batch, heads, q_len, rank = q.shape
    rope, size = q_rope.shape[3], latent[0].shape[2]
    index, itemsize, rows = q.device.index, q.element_size(), heads * q_len
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
    table_width = 0 if table is None else table.stride(0)
    constants = {
        "HEADS": heads,
        "Q_LEN": q_len,
        "RANK": rank,
        "ROPE": rope,
        "PAGE": 0 if table is None else size,
        "RING": ring,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
    }
    more = {
        "QUANT": len(latent) - 1,
        "RECENT": len(recent) > 0,
        "BLOCK_R": max(next_power_of_two(rank), 16),
        "BLOCK_P": max(next_power_of_two(rope), 16),
        "PRECISION": "ieee",
    }

    def launch(splits: int) -> tuple[Repeat, ...]:
        grid, split = (m_tiles, splits, batch), {**constants, "SPLIT": splits > 1}
        numbers = (back, ahead, scale, splits, size)
        if hopper:
            kernel = Repeat(
                launcher("hopper"), grid, (*numbers, table_width, *strides), split, num_warps=tiles.num_warps
            )
            merging = {"DV": rank, **merging_for(splits, 1, rank, 4)}
            return kernel, Repeat(launcher("merge"), (batch * rows, 1, 1), (), merging, num_warps=4)
        kernel = Repeat(
            launcher("latent"),
            grid,
            (*numbers, recent[0].shape[2] if recent else 0, table_width, *strides),
            {**split, **more, **merging_for(splits, min(rows, tiles.block_m), rank, tiles.num_warps)},
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        return (kernel,)

    slots = num_multiprocessors(index) * tiles.resident
    return Plan(hopper, tiles, batch * m_tiles, back + ahead + q_len, slots, launch, {})


def suits_hopper(
    q: Tensor, q_rope: Tensor, latent: Sequence[Tensor], rope_key: Sequence[Tensor], strides: Sequence[int]
) -> bool:
    """Whether the kernel of Hopper GPUs takes the call: many heads, DeepSeek's sizes, and copies of 16 bytes."""
    return (
        q.shape[1] * q.shape[2] > FEW
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


def launcher(name: str) -> Launcher:
    """The launcher of a kernel; Triton is imported here, at the first use."""
    if name == "hopper":
        from attnzoo.ops.latent.triton.hopper import hopper_kernel

        return launcher_of(hopper_kernel)
    from attnzoo.ops.decoding.triton.merging import merge_kernel
    from attnzoo.ops.latent.triton.kernels import latent_kernel

    return launcher_of({"latent": latent_kernel, "merge": merge_kernel}[name])


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
