"""Pages of int8 numbers."""

from __future__ import annotations

import torch

from attnzoo.caches.paged import PagedCache
from attnzoo.caches.quantization import Int8Storage
from attnzoo.caches.token_cache import check_least


class PagedInt8Cache(PagedCache):
    """A `PagedCache` whose pages hold int8 numbers and scales as `Int8Cache` does, with the same bound on the error.

    The newest `residual` tokens of each row are held in `dtype` besides, outside the pages. An adopted row begins
    without them, since they are known to its pages in int8 only.

    Args:
        batch_size: rows.
        num_kv_heads: heads of keys and values.
        num_pages: pages in the pool, shared by all rows.
        head_dim: size of a key.
        v_head_dim: size of a value; None: `head_dim`.
        page_size: tokens a page, a power of two and at least 16.
        max_length: tokens that a row may have; None: as many as fit in all pages.
        symmetric: False: with an offset for each token and head.
        residual: newest tokens of each row that are held in `dtype` as well; 0: none.
        dtype: of what is appended and viewed.
        device: of everything.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        num_pages: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        page_size: int = 64,
        max_length: int | None = None,
        symmetric: bool = True,
        residual: int = 64,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_least("residual", residual, 0)
        self.symmetric, self.residual = symmetric, residual
        super().__init__(
            batch_size,
            num_kv_heads,
            num_pages,
            head_dim,
            v_head_dim,
            page_size=page_size,
            max_length=max_length,
            dtype=dtype,
            device=device,
        )
        self._hold_recent(residual)

    def _storage(self, dim: int) -> Int8Storage:
        shape = (self.num_pages, self.num_kv_heads, self.page_size, dim)
        return Int8Storage(*shape, self.dtype, self.device, symmetric=self.symmetric)
