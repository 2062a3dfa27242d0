"""Keys and values made from a cache, with that cache's lengths."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnzoo.ops.decoding.api import KeyValues


@dataclass(frozen=True)
class Held:
    """What `decode` reads: `k [B, Hk, n, D]` and `v [B, Hk, n, Dv]`, one for each token that `cache` holds."""

    cache: KeyValues
    k: Tensor
    v: Tensor

    @property
    def length(self) -> int:
        return self.cache.length

    @property
    def uniform(self) -> bool:
        return self.cache.uniform

    @property
    def lengths(self) -> Tensor:
        return self.cache.lengths

    @property
    def first(self) -> int | Tensor:
        return self.cache.first

    @property
    def kept(self) -> int | None:
        return self.cache.kept

    def row_lengths(self) -> list[int]:
        return self.cache.row_lengths()

    def view(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v
