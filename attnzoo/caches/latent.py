"""The cache of latent attention: one latent and one rope key a token, whatever the number of heads."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.caches.base import Cache
from attnzoo.caches.contiguous import ContiguousCache


class LatentCache(Cache):
    """Latents `[B, 1, max_length, kv_lora_rank]` and rope keys `[B, 1, max_length, qk_rope_head_dim]`, filled from the
    left (DeepSeek-V2, arXiv:2405.04434).

    The latents stand in the place of keys and the rope keys in the place of values, as one head, so a cache of any
    other kind with `num_kv_heads=1, head_dim=kv_lora_rank, v_head_dim=qk_rope_head_dim` does the same. This one lays
    both side by side, so that `joint` needs no copy. It holds `kv_lora_rank + qk_rope_head_dim` numbers a token and
    nothing else; nothing waits for the device while all rows are equally long.

    Args:
        batch_size: rows.
        max_length: tokens that each row has room for.
        kv_lora_rank: size of a latent.
        qk_rope_head_dim: size of a rope key.
        dtype: of both.
        device: of both.
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        for name, size in (("kv_lora_rank", kv_lora_rank), ("qk_rope_head_dim", qk_rope_head_dim)):
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        self._rows = ContiguousCache(
            batch_size, 1, max_length, kv_lora_rank + qk_rope_head_dim, 0, dtype=dtype, device=device
        )
        self.batch_size, self.num_kv_heads, self.max_length = batch_size, 1, max_length
        self.head_dim, self.v_head_dim = kv_lora_rank, qk_rope_head_dim

    @property
    def length(self) -> int:
        return self._rows.length

    @property
    def uniform(self) -> bool:
        return self._rows.uniform

    @property
    def lengths(self) -> Tensor:
        return self._rows.lengths

    @property
    def dtype(self) -> torch.dtype:
        return self._rows.dtype

    @property
    def device(self) -> torch.device:
        return self._rows.device

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, for all tokens that there is room for."""
        return self.batch_size * self.max_length * (self.head_dim + self.v_head_dim) * self.dtype.itemsize

    def row_lengths(self) -> list[int]:
        return self._rows.row_lengths()

    def append(self, latent: Tensor, rope_key: Tensor, lengths: Tensor | None = None) -> None:
        """Add S tokens after each row's last.

        Args:
            latent: `[B, 1, S, kv_lora_rank]`, normalised, of the cache's dtype and device.
            rope_key: `[B, 1, S, qk_rope_head_dim]`, rotated, likewise.
            lengths: `[B]` int64 or int32, how many of the S tokens are real (right padding); None: all.
                Reading it waits for the device.

        Raises:
            ValueError: for another shape, dtype or device than the cache's, lengths out of range, or more tokens than
                there is room for. Nothing has been written then.
        """
        self._check_new(latent, rope_key)
        self._rows.append(torch.cat([latent, rope_key], dim=-1), rope_key[..., :0], lengths)

    def view(self) -> tuple[Tensor, Tensor]:
        """Latents `[B, 1, length, kv_lora_rank]` and rope keys `[B, 1, length, qk_rope_head_dim]`, not copied."""
        joint = self.joint()
        return joint[..., : self.head_dim], joint[..., self.head_dim :]

    def joint(self) -> Tensor:
        """Latents and rope keys side by side, `[B, 1, length, kv_lora_rank + qk_rope_head_dim]`, not copied."""
        return self._rows.view()[0]

    def crop(self, length: int) -> None:
        self._rows.crop(length)

    def reorder(self, indices: Tensor) -> None:
        self._rows.reorder(indices)

    def select(self, indices: Tensor) -> None:
        self._rows.select(indices)
        self.batch_size = self._rows.batch_size

    def repeat(self, count: int) -> None:
        self._rows.repeat(count)
        self.batch_size = self._rows.batch_size

    def reset(self) -> None:
        self._rows.reset()

    def _check_new(self, latent: Tensor, rope_key: Tensor) -> None:
        for name, given, size in (("latent", latent, self.head_dim), ("rope_key", rope_key, self.v_head_dim)):
            new = latent.shape[2] if latent.dim() == 4 else -1
            if tuple(given.shape) != (self.batch_size, 1, new, size):
                expected = f"[{self.batch_size}, 1, S, {size}]"
                raise ValueError(f"{name} has shape {list(given.shape)}; this cache takes {expected}")
            if given.dtype != self.dtype or given.device != self.device:
                raise ValueError(
                    f"{name} is {given.dtype} on {given.device}; this cache is {self.dtype} on {self.device}"
                )
