"""Memory for keys or values in blocks: a row of a contiguous cache, a ring, or a page."""

from __future__ import annotations

import torch
from torch import Tensor


class Storage:
    """`blocks` blocks of `size` slots, each slot a vector of `dim` numbers a head, kept as they are.

    The layout is `[blocks, Hk, size, dim]`: one head of one block is one dense `[size, dim]` matrix, whether the block
    is a row or a page, so a kernel loads either as a tile with one base address.

    A storage that keeps vectors in another form overrides `encode` and `decode`; the `parts` of that form all have the
    shape `[blocks, Hk, size, ...]`, so that writing, reading and moving need not know what they are.
    """

    def __init__(
        self,
        blocks: int,
        num_heads: int,
        size: int,
        dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.parts: tuple[Tensor, ...] = (torch.zeros(blocks, num_heads, size, dim, dtype=dtype, device=device),)

    def encode(self, values: Tensor) -> tuple[Tensor, ...]:
        """Vectors `[..., dim]` in the form in which they are kept, one tensor for each of `parts`."""
        return (values,)

    def decode(self, parts: tuple[Tensor, ...]) -> Tensor:
        """The way back: `[..., dim]`."""
        return parts[0]

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return sum(part.nbytes for part in self.parts)

    @property
    def bytes_per_slot(self) -> int:
        """Bytes that one token takes, all heads together."""
        blocks, _, size = self.parts[0].shape[:3]
        return self.nbytes // (blocks * size)

    def write(self, blocks: Tensor, slots: Tensor, values: Tensor) -> None:
        """Put `values [..., Hk, dim]` where `blocks` and `slots`, broadcast to `[...]`, say; no place twice."""
        for part, new in zip(self.parts, self.encode(values), strict=True):
            part[blocks, :, slots] = new

    def write_all(self, start: int, values: Tensor) -> None:
        """Put `values [blocks, Hk, S, dim]` into all blocks, from slot `start` on."""
        for part, new in zip(self.parts, self.encode(values), strict=True):
            part[:, :, start : start + values.shape[2]] = new

    def read(self, blocks: Tensor, slots: Tensor) -> Tensor:
        """What stands at `blocks` and `slots`, broadcast to `[B, n]`: `[B, Hk, n, dim]`, a copy."""
        return self.decode(tuple(part[blocks, :, slots].transpose(1, 2) for part in self.parts))

    def read_all(self, count: int) -> Tensor:
        """The first `count` slots of all blocks, `[blocks, Hk, count, dim]`; not copied where kept as they are."""
        return self.decode(tuple(part[:, :, :count] for part in self.parts))

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Make blocks `targets` equal to blocks `sources`."""
        for part in self.parts:
            part[targets] = part[sources]

    def reorder(self, indices: Tensor, count: int) -> None:
        """Block b becomes what block `indices[b]` was, in its first `count` slots; the memory stays where it is."""
        for part in self.parts:
            part[:, :, :count] = part[:, :, :count].index_select(0, indices)

    def select(self, indices: Tensor) -> None:
        """Keep the blocks `indices`, in that order."""
        self.parts = tuple(part.index_select(0, indices) for part in self.parts)
