"""Which dimensions of a head RoPE (arXiv 2104.09864) turns, and in which pairs: what new keys have to respect."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["half", "interleaved"]


@dataclass(frozen=True)
class Rotary:
    """The first `size` dimensions of a head are turned in pairs (planes); 0: none are.

    `half`: dimension f goes with f + size / 2 (Llama, NeoX); `interleaved`: 2 f with 2 f + 1 (GPT-J, Cohere).
    """

    size: int = 0
    layout: Layout = "half"

    def planes(self) -> tuple[Tensor, Tensor]:
        """The planes' first and second dimensions, `[size / 2]` each."""
        if self.layout == "half":
            first = torch.arange(self.size // 2)
            return first, first + self.size // 2
        first = torch.arange(0, self.size, 2)
        return first, first + 1

    def free(self, head_dim: int) -> Tensor:
        """The dimensions that are not turned."""
        return torch.arange(self.size, head_dim)
