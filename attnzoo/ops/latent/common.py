"""What the latent backends share: the validated call, and keys and values made from a cache, with its lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from attnzoo.masks import Mask
from attnzoo.ops.decoding import KeyValues, Stored


class Call(NamedTuple):
    """One call of `latent_decode`, validated and with its defaults filled in; what backends judge and run."""

    q_latent: Tensor  # [B, H, Sq, R]
    q_rope: Tensor  # [B, H, Sq, Dr]
    cache: KeyValues
    stored: Stored
    mask: Mask
    scale: float
    starts: int | Tensor  # positions of the first queries


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
