"""The plain cache at half the memory of bf16: int8, and the newest tokens as they came."""

from __future__ import annotations

import torch

from attnzoo.caches.contiguous import ContiguousCache
from attnzoo.caches.quantization import Int8Storage
from attnzoo.caches.token_cache import check_least


class Int8Cache(ContiguousCache):
    """A `ContiguousCache` of int8 numbers with one fp32 scale a token and head, for keys and for values.

    Every token is quantised as it comes. The newest `residual` ones are held in `dtype` besides, and read from there;
    so a crop needs no care, and there is no step at which a whole block has to be quantised.

    `|x - view()| <= scale / 2` for each element, where scale is `max |x| / 127` over a token's head (asymmetric:
    `(max x - min x) / 255`), plus the rounding of `dtype`; the newest `residual` tokens come back exactly.

    Args:
        batch_size: rows.
        num_kv_heads: heads of keys and values.
        max_length: tokens that each row has room for.
        head_dim: size of a key.
        v_head_dim: size of a value; None: `head_dim`.
        symmetric: False: with an offset for each token and head, for heads whose numbers lie to one side of 0.
        residual: newest tokens of each row that are held in `dtype` as well; 0: none.
        dtype: of what is appended and viewed.
        device: of everything.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        symmetric: bool = True,
        residual: int = 64,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_least("residual", residual, 0)
        self.symmetric, self.residual = symmetric, residual
        super().__init__(batch_size, num_kv_heads, max_length, head_dim, v_head_dim, dtype=dtype, device=device)
        self._hold_recent(residual)

    def _storage(self, dim: int) -> Int8Storage:
        shape = (self.batch_size, self.num_kv_heads, self.max_length, dim)
        return Int8Storage(*shape, self.dtype, self.device, symmetric=self.symmetric)
