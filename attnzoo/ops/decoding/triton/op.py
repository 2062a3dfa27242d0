"""From stored keys and values to the kernels, which are imported when they first run, and the custom operator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from attnzoo.ops.decoding.triton.plan import fitted, next_power_of_two, shared_memory, splits_for, tiles_for
from attnzoo.ops.launcher import Launcher
from attnzoo.ops.launching import capability, interpreted, num_multiprocessors


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
    rows = heads // k_heads * q_len
    page = 0 if table is None else size
    tiles = tiles_for(rows, dim, v_dim, q.element_size(), len(k) > 1, page)
    tiles = fitted(tiles, dim * q.element_size(), (dim + v_dim) * k[0].element_size(), shared_memory(q.device.index))
    m_tiles = -(-rows // tiles.block_m)
    reach = min(longest, back + ahead + q_len)
    slots = num_multiprocessors(q.device.index) * tiles.resident
    splits = splits_for(batch * k_heads * m_tiles, -(-reach // tiles.block_n), slots)
    part, lse = parts_for(out, splits)
    launcher("decode")(
        (splits, k_heads * m_tiles, batch),
        (
            *(q, *three(k), *three(v), *(recent or (None, None))),
            *(table, lengths, starts, kept, sinks, out, part, lse),
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
            "PAGE": page,
            "RING": ring,
            "QUANT": len(k) - 1,
            "RECENT": len(recent) > 0,
            "INTEGER": tiles.integers,
            "SOFTCAP": softcap is not None,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_D": max(next_power_of_two(dim), 16),
            "BLOCK_DV": max(next_power_of_two(v_dim), 16),
            "EARLY": starts_early(q.device),
            "PRECISION": "ieee",
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    merge(part, lse, sinks, out)
    return out


decode_op = torch.library.custom_op("attnzoo::decode", decode, mutates_args=())


@lru_cache(maxsize=8)
def launcher(name: str) -> Launcher:
    """The launcher of a kernel; Triton is imported here, at the first use."""
    from attnzoo.ops.decoding.triton import kernels, merging

    return Launcher({"decode": kernels.decode_kernel, "merge": merging.merge_kernel}[name])


def starts_early(device: torch.device) -> bool:
    """Whether the merge can be launched while the splits still run (programmatic dependent launch, from Hopper on)."""
    return device.type == "cuda" and not interpreted() and capability(device.index) >= (9, 0)


def parts_for(out: Tensor, splits: int) -> tuple[Tensor | None, Tensor | None]:
    """Memory for the splits' shares `[B, H, Sq, splits, Dv]` and logsumexps; none where nothing is split."""
    if splits == 1:
        return None, None
    shape = *out.shape[:3], splits
    part = torch.empty(*shape, out.shape[3], dtype=torch.float32, device=out.device)
    return part, torch.empty(shape, dtype=torch.float32, device=out.device)


def merge(part: Tensor | None, lse: Tensor | None, sinks: Tensor | None, out: Tensor) -> None:
    """Merge shares `part [B, H, Sq, splits, Dv]` with their logsumexps `lse` into `out`, if there are any."""
    if part is None or lse is None:
        return
    batch, heads, q_len, splits, v_dim = part.shape
    width = min(next_power_of_two(v_dim), 128)
    early = starts_early(out.device)
    launcher("merge")(
        (batch * heads * q_len, -(-v_dim // width), 1),
        (part, lse, sinks, out, splits, heads),
        {"Q_LEN": q_len, "DV": v_dim, "BLOCK_S": next_power_of_two(splits), "BLOCK_DV": width, "EARLY": early},
        num_warps=4 if splits > 8 else 2,
        **({"launch_pdl": True} if early else {}),
    )


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
