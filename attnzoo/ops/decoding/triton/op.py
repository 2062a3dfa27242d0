"""From stored keys and values to the kernels, which are imported when they first run, and the custom operator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from attnzoo.ops.decoding.triton.counters import counters
from attnzoo.ops.decoding.triton.plan import (
    fitted,
    merge_constants,
    merge_for,
    next_power_of_two,
    shared_memory,
    splits_for,
    tiles_for,
)
from attnzoo.ops.launcher import Launcher
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
    ring: bool,
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
        back, ahead: query i sees key j iff -ahead <= i - j < back.
        ring: whether k and v are rings.
        scale: of the scores.
        softcap: of the scores, or none.

    Returns:
        `[B, Hq, Sq, Dv]`.
    """
    batch, heads, q_len, dim = q.shape
    k_heads, size, v_dim = k[0].shape[1], k[0].shape[2], v[0].shape[3]
    out = q.new_empty(batch, heads, q_len, v_dim)
    if out.numel() == 0:
        return out
    index = q.device.index
    rows = heads // k_heads * q_len
    tiles = tiles_for(rows, dim, v_dim, q.element_size(), len(k) > 1, 0 if table is None else size)
    tiles = fitted(tiles, dim * q.element_size(), (dim + v_dim) * k[0].element_size(), shared_memory(index))
    m_tiles = -(-rows // tiles.block_m)
    programs = batch * k_heads * m_tiles
    reach = min(longest, back + ahead + q_len)
    splits = splits_for(programs, -(-reach // tiles.block_n), num_multiprocessors(index) * tiles.resident)
    part = parts_for(out, splits)
    arrived, merging = merging_for(part, splits, programs, min(rows, tiles.block_m), v_dim, tiles.num_warps)
    launcher()(
        (splits, k_heads * m_tiles, batch),
        (
            *(q, *three(k), *three(v), *(recent or (None, None))),
            *(table, lengths, starts, kept, sinks, out, part, arrived),
            *(*shared, back, ahead, scale, 0.0 if softcap is None else softcap, splits),
            *(size, recent[0].shape[2] if recent else 0, heads, k_heads, 0 if table is None else table.stride(0)),
            *(*q.stride()[:3], *k[0].stride()[:3], *v[0].stride()[:3]),
        ),
        {
            "GROUP": heads // k_heads,
            "Q_LEN": q_len,
            "D": dim,
            "DV": v_dim,
            "SPLIT": splits > 1,
            "PAGE": 0 if table is None else size,
            "RING": ring,
            "QUANT": len(k) - 1,
            "RECENT": len(recent) > 0,
            "INTEGER": tiles.integers,
            "SOFTCAP": softcap is not None,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_D": max(next_power_of_two(dim), 16),
            "BLOCK_DV": max(next_power_of_two(v_dim), 16),
            **merging,
            "PRECISION": "ieee",
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out


decode_op = torch.library.custom_op("attnzoo::decode", decode, mutates_args=())


@lru_cache(maxsize=1)
def launcher() -> Launcher:
    """The kernel's launcher; Triton is imported here, at the first use."""
    from attnzoo.ops.decoding.triton import kernels

    return Launcher(kernels.decode_kernel)


def parts_for(out: Tensor, splits: int) -> Tensor | None:
    """Memory for what splits find, `[B, H, Sq, splits, Dv]` and as many logsumexps; none where nothing is split."""
    if splits == 1:
        return None
    return torch.empty(
        out.numel() // out.shape[3] * splits * (out.shape[3] + 1), dtype=torch.float32, device=out.device
    )


def merging_for(
    part: Tensor | None, splits: int, programs: int, rows: int, v_dim: int, num_warps: int
) -> tuple[Tensor | None, dict[str, int]]:
    """How programs count, and the kernel's constants that say how they merge.

    Args:
        part: from `parts_for`.
        splits: parts of each row.
        programs: of one split.
        rows: queries of a program.
        v_dim: size of a value.
        num_warps: of a program.
    """
    if part is None:
        return None, merge_constants(merge_for(1, 1, 1, 1))
    return counters(part.device, programs, splits), merge_constants(merge_for(rows, splits, v_dim, num_warps))


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
    ring: bool,
    scale: float,
    softcap: float | None,
) -> Tensor:
    return q.new_empty(*q.shape[:3], v[0].shape[3])


def three(parts: Sequence[Tensor]) -> list[Tensor | None]:
    """Three kernel arguments: vectors, scales, offsets."""
    return [*parts, *[None] * (3 - len(parts))]
