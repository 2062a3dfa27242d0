"""Eight bits a number: one scale a token and head."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.caches.storage import Storage

_LEAST = torch.finfo(torch.float32).tiny  # of a scale, so that vectors of zeros divide


class Int8Storage(Storage):
    """Vectors x as int8 codes c `[blocks, Hk, size, dim]` and fp32 scales s `[blocks, Hk, size, 1]`.

    Symmetric: x is about c * s with s = max |x| / 127. Asymmetric: x is about c * s + offset, with
    s = (max x - min x) / 255 and a third part `[blocks, Hk, size, 1]` for the offsets, min x + 128 * s.

    Either way |x - decode(encode(x))| <= s / 2 for each element, plus the rounding of fp32 (a few 1e-7 of max |x|) and
    that of `dtype`, in which it is given back.
    """

    def __init__(
        self,
        blocks: int,
        num_heads: int,
        size: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        *,
        symmetric: bool = True,
    ) -> None:
        if dim < 1:
            raise ValueError(f"v_head_dim is {dim}; it must be at least 1 in int8")
        self.dtype, self.symmetric = dtype, symmetric
        shape = (blocks, num_heads, size)
        codes = torch.zeros(*shape, dim, dtype=torch.int8, device=device)
        others = [torch.zeros(*shape, 1, dtype=torch.float32, device=device) for _ in range(1 if symmetric else 2)]
        self.parts = (codes, *others)

    def encode(self, values: Tensor) -> tuple[Tensor, ...]:
        x = values.float()
        if self.symmetric:
            scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=_LEAST)
            return (x / scale).round().clamp(-127, 127).to(torch.int8), scale
        least, most = x.aminmax(dim=-1, keepdim=True)
        scale = ((most - least) / 255).clamp(min=_LEAST)
        codes = ((x - least) / scale).round().clamp(0, 255) - 128
        return codes.to(torch.int8), scale, least + 128 * scale

    def decode(self, parts: tuple[Tensor, ...]) -> Tensor:
        codes, scale, *offset = parts
        x = codes.float() * scale
        return (x if self.symmetric else x + offset[0]).to(self.dtype)
