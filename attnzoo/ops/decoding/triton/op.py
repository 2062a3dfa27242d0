"""From stored keys and values to the kernels, which are imported when they first run, and the custom operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnzoo.ops.decoding.triton.counters import counters
from attnzoo.ops.decoding.triton.plan import (
    Tiles,
    fitted,
    merge_constants,
    merge_for,
    next_power_of_two,
    shared_memory,
    splits_for,
    tiles_for,
)
from attnzoo.ops.decoding.triton.repeating import Plans, Repeat
from attnzoo.ops.launcher import Launcher, launcher_of
from attnzoo.ops.launching import num_multiprocessors


def decode(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    recent: Sequence[Tensor],
    table: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    kept: Tensor | None,
    sinks: Tensor | None,
    shared: Sequence[int],
    longest: int,
    back: int,
    ahead: int,
    prefix: int,
    ring: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attend from `q [B, Hq, Sq, D]` to what is stored.

    Args:
        q: its last stride is 1.
        k, v: vectors, codes and scale, or codes, scale and offset, as `Stored` holds them.
        recent: rings of the newest keys and values as they came, or nothing.
        table: `[B, pages]` int32.
        lengths, starts, kept: `[B]` integers that are added to `shared`, which holds one number of each for all rows.
        sinks: `[Hq]`.
        longest: no row has more keys.
        back, ahead, prefix: query i sees key j iff -ahead <= i - j < back, or j < prefix and j <= i.
        ring: slots of a ring that k and v are, and after which the prefix may stand; 0: they are none.
        scale: of the scores.
        softcap: of the scores, or none.

    Returns:
        `[B, Hq, Sq, Dv]`.
    """
    plan = plans.get(
        (
            *(q.shape, q.stride(), q.dtype, q.device, form_of(k, v, recent)),
            *(ring, back, ahead, prefix, scale, softcap, longest < 2**31),
            *(dtypes_of(table, lengths, starts, kept, sinks), None if table is None else table.stride(0)),
        ),
        lambda: _planned(q, k, v, recent, table, back, ahead, prefix, ring, scale, softcap),
    )
    out = q.new_empty(plan.shape)
    if plan.programs == 0:
        return out
    splits = splits_for(plan.programs, -(-min(longest, plan.reach) // plan.tiles.block_n), plan.slots)
    repeat = plan.repeats.get(splits)
    if repeat is None:
        repeat = plan.repeats[splits] = plan.launch(splits)
    part = arrived = None
    if splits > 1:
        part, arrived = parts_for(out, splits), counters(q.device, plan.programs, splits)
    held = (*three(k), *three(v), *(recent or (None, None)), table)
    repeat((q, *held, lengths, starts, kept, sinks, out, part, arrived), shared)
    return out


class Plan(NamedTuple):
    """What calls of one form share."""

    shape: tuple[int, ...]  # of the result
    tiles: Tiles
    programs: int  # of one split; 0: there is nothing to do
    reach: int  # keys that the queries of a row see at most
    slots: int  # programs that run at a time
    launch: Callable[[int], Repeat]  # by number of splits
    repeats: dict[int, Repeat]


plans: Plans[Plan] = Plans()


def form_of(k: Sequence[Tensor], v: Sequence[Tensor], recent: Sequence[Tensor]) -> tuple[Any, ...]:
    """What a launch depends on of what is stored, but for addresses; what stands beside vectors is dense."""
    a, b = k[0], v[0]
    vectors = a.shape, a.stride(), a.dtype, b.shape, b.stride(), b.dtype
    if len(k) == len(v) == 1 and not recent:
        return vectors
    return *vectors, len(k), *[t.dtype for t in (*k[1:], *v[1:], *recent)], recent[0].shape[2] if recent else 0


def dtypes_of(*tensors: Tensor | None) -> Any:
    """The dtypes of tensors; None for no tensors at all."""
    for tensor in tensors:
        if tensor is not None:
            return tuple(None if t is None else t.dtype for t in tensors)
    return None


def _planned(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    recent: Sequence[Tensor],
    table: Tensor | None,
    back: int,
    ahead: int,
    prefix: int,
    ring: int,
    scale: float,
    softcap: float | None,
) -> Plan:
    batch, heads, q_len, dim = q.shape
    k_heads, size, v_dim = k[0].shape[1], k[0].shape[2], v[0].shape[3]
    index, rows = q.device.index, heads // k_heads * q_len
    page, reach = 0 if table is None else size, back + ahead + q_len + prefix
    tiles = tiles_for(rows, dim, v_dim, q.element_size(), len(k) > 1, page, reach)
    tiles = fitted(tiles, dim * q.element_size(), (dim + v_dim) * k[0].element_size(), shared_memory(index))
    m_tiles = -(-rows // tiles.block_m)
    recent_size, table_width = recent[0].shape[2] if recent else 0, 0 if table is None else table.stride(0)
    strides = (*q.stride()[:3], *k[0].stride()[:3], *v[0].stride()[:3])
    constants = {
        "GROUP": heads // k_heads,
        "Q_LEN": q_len,
        "D": dim,
        "DV": v_dim,
        "PAGE": page,
        "RING": ring > 0,
        "QUANT": len(k) - 1,
        "RECENT": len(recent) > 0,
        "INTEGER": tiles.integers,
        "SOFTCAP": softcap is not None,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": max(next_power_of_two(dim), 16),
        "BLOCK_DV": max(next_power_of_two(v_dim), 16),
        "PRECISION": "ieee",
    }

    def launch(splits: int) -> Repeat:
        numbers = (back, ahead, prefix or None, scale, 0.0 if softcap is None else softcap, splits)
        merging = merging_for(splits, min(rows, tiles.block_m), v_dim, tiles.num_warps)
        return Repeat(
            launcher(),
            (splits, k_heads * m_tiles, batch),
            (*numbers, ring or size, recent_size, heads, k_heads, table_width, *strides),
            {**constants, "SPLIT": splits > 1, **merging},
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )

    shape = batch, heads, q_len, v_dim
    programs = batch * k_heads * m_tiles if v_dim else 0
    return Plan(shape, tiles, programs, reach, num_multiprocessors(index) * tiles.resident, launch, {})


decode_op = torch.library.custom_op("attnzoo::decode", decode, mutates_args=())


def launcher() -> Launcher:
    """The kernel's launcher; Triton is imported here, at the first use."""
    from attnzoo.ops.decoding.triton import kernels

    return launcher_of(kernels.decode_kernel)


def parts_for(out: Tensor, splits: int) -> Tensor:
    """Memory for what splits find, `[B, H, Sq, splits, Dv]` and as many logsumexps."""
    v_dim = out.shape[3]
    return out.new_empty(out.numel() // v_dim * splits * (v_dim + 1), dtype=torch.float32)


def merging_for(splits: int, rows: int, v_dim: int, num_warps: int) -> dict[str, int]:
    """The kernel's constants that say how programs merge.

    Args:
        splits: parts of each row.
        rows: queries of a program.
        v_dim: size of a value.
        num_warps: of a program.
    """
    return merge_constants(merge_for(rows, splits, v_dim, num_warps) if splits > 1 else merge_for(1, 1, 1, 1))


@decode_op.register_fake
def _(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    recent: Sequence[Tensor],
    table: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    kept: Tensor | None,
    sinks: Tensor | None,
    shared: Sequence[int],
    longest: int,
    back: int,
    ahead: int,
    prefix: int,
    ring: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    return q.new_empty(*q.shape[:3], v[0].shape[3])


def three(parts: Sequence[Tensor]) -> list[Tensor | None]:
    """Three kernel arguments: vectors, scales, offsets."""
    return [*parts, *[None] * (3 - len(parts))]
