"""How large the kernels' tiles are, and into how many parts sequences are cut."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.ops.launching import interpreted, num_multiprocessors


class Tiles(NamedTuple):
    """One kernel's configuration."""

    chunk: int  # tokens looked at together
    block: int  # columns that one program writes: of values, or of features where it is queries' or keys' gradients
    warps: int
    stages: int  # of the pipeline of loads
    state_first: bool = False  # `attend` multiplies with the state as first operand


class NearTiles(NamedTuple):
    """The configuration of one of the kernels of the hybrid's window."""

    rows: int  # tokens of a program
    columns: int  # of the other side, looked at together
    warps: int
    stages: int


class Config(NamedTuple):
    """Tiles of every kernel of a call."""

    sums: Tiles
    attend: Tiles
    sum_gradients: Tiles
    queries: Tiles
    keys: Tiles
    values: Tiles
    per_sm: int  # programs that a multiprocessor should have
    dim: int
    v_dim: int
    least: int  # columns of a tile; narrower heads are padded
    compute: torch.dtype  # what is multiplied; fp16 as tf32, which has its precision and fp32's range
    precision: str

    @property
    def granule(self) -> int:
        """What the length of a part is a multiple of."""
        return max(tiles.chunk for tiles in self[:6])


class Parts(NamedTuple):
    """How sequences are cut."""

    part: int  # tokens
    parts: int  # of each row; of all packed documents together, at most
    programs: int
    table: Tensor | None = None  # [programs, 2]: document and place in it, place -1 for nobody; None: rows alike
    firsts: Tensor | None = None  # [N + 1]: each document's first program

    @property
    def several(self) -> bool:
        """Whether any sequence has more than one part."""
        return self.parts > 1


def power_of_two(size: int, least: int = 16) -> int:
    """The least power of two of at least `size` and `least`."""
    return max(least, 1 << (size - 1).bit_length())


def compute_dtype(features: torch.dtype, values: torch.dtype) -> tuple[torch.dtype, str]:
    """What the kernels multiply, and how precisely."""
    if features == values == torch.bfloat16:
        return torch.bfloat16, "ieee"
    if features == values == torch.float16 or torch.backends.cuda.matmul.allow_tf32:
        return torch.float32, "tf32"
    return torch.float32, "ieee"


def configure(dim: int, v_dim: int, features: torch.dtype, values: torch.dtype) -> Config:
    """The configuration for heads of these sizes."""
    widest = power_of_two(max(dim, v_dim))
    compute, precision = compute_dtype(features, values)
    per_sm, least = 2, 16
    tiles: tuple[Tiles, ...]
    if interpreted():
        tiles = (Tiles(16, 32, 4, 1, widest > 32),) * 6
    elif compute == torch.bfloat16:
        # Rows of fewer than 128 bytes make wrong operands of Hopper's matrix products (seen with Triton 3.6).
        least = 64
        tiles, per_sm = half_tiles(widest)
    elif precision == "tf32":
        least = 32
        tiles = (Tiles(32, 64 if widest <= 128 else 32, 4, 1),) * 6
    else:  # without tensor cores: small tiles, or the code explodes
        tiles = (Tiles(16, 32, 4, 1),) * 6
    sums, attend, sum_gradients, queries, keys, d_values = tiles
    return Config(sums, attend, sum_gradients, queries, keys, d_values, per_sm, dim, v_dim, least, compute, precision)


def half_tiles(widest: int) -> tuple[tuple[Tiles, ...], int]:
    """Tiles of bf16, of every kernel, and how many programs a multiprocessor should have."""
    if widest <= 64:
        return (Tiles(64, 64, 4, 4), *(Tiles(64, 64, 4, 3),) * 5), 2
    if widest <= 128:  # two groups of warps, over all columns: so nothing is mapped twice
        return (Tiles(64, 128, 8, 3, True),) * 6, 1
    return (Tiles(64, 64, 8, 1),) * 6, 1


def near_tiles(config: Config) -> tuple[NearTiles, NearTiles, NearTiles]:
    """Tiles of the kernels of the hybrid's window, which hold all columns: outputs, queries' and keys' gradients."""
    if config.compute != torch.bfloat16:
        chunk = config.attend.chunk
        return (NearTiles(chunk, chunk, 4, 1),) * 3
    if max(config.dim, config.v_dim) <= 64:
        return NearTiles(64, 32, 4, 1), NearTiles(64, 32, 4, 2), NearTiles(64, 64, 4, 1)
    return NearTiles(64, 32, 4, 1), NearTiles(64, 64, 4, 2), NearTiles(64, 32, 4, 1)


def is_full(length: int, config: Config, lengths: Tensor | None, cu_seqlens: Tensor | None) -> bool:
    """Whether every token of every chunk is a real one."""
    return lengths is None and cu_seqlens is None and length % config.granule == 0


def cut(rows: int, heads: int, length: int, config: Config, device: torch.device, cu_seqlens: Tensor | None) -> Parts:
    """Parts of about the length at which all programs of `heads` a row fill the GPU at once."""
    granule = config.granule
    programs = rows * heads * -(-config.v_dim // config.attend.block)
    wanted = num_multiprocessors(device.index) * config.per_sm // programs
    wanted = max(1, min(wanted, -(-length // (4 * granule))))
    return divide(rows, length, max(granule, -(-length // (wanted * granule)) * granule), cu_seqlens)


def divide(rows: int, length: int, part: int, cu_seqlens: Tensor | None) -> Parts:
    """Parts of so many tokens."""
    if cu_seqlens is None:
        parts = max(1, -(-length // part))
        return Parts(part, parts, rows * parts)
    documents = cu_seqlens.shape[0] - 1
    programs = length // part + documents
    counts = ((torch.diff(cu_seqlens) + part - 1) // part).clamp(min=1)
    ends = counts.cumsum(0)
    place = torch.arange(programs, device=cu_seqlens.device)
    owner = torch.searchsorted(ends, place, right=True)
    nobody = owner >= documents
    owner = owner.clamp(max=documents - 1)
    place = place - (ends - counts)[owner]
    table = torch.stack([owner, place.masked_fill(nobody, -1)], dim=1).int()
    firsts = torch.cat([ends.new_zeros(1), ends]).int()
    return Parts(part, 1 if part >= length else 2, programs, table, firsts)
