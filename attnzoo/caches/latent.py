"""The cache of latent attention: one latent and one rope key a token, whatever the number of heads."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.caches.places import places
from attnzoo.caches.storage import Storage
from attnzoo.caches.token_cache import TokenCache, check_least
from attnzoo.ops.decoding.stored import Stored


class LatentCache(TokenCache):
    """Latents `[B, 1, max_length, kv_lora_rank]` in the place of keys and rope keys `[B, 1, max_length,
    qk_rope_head_dim]` in the place of values, filled from the left (DeepSeek-V2, arXiv:2405.04434).

    It holds `kv_lora_rank + qk_rope_head_dim` numbers a token and nothing else. A cache of any other kind with
    `num_kv_heads=1, head_dim=kv_lora_rank, v_head_dim=qk_rope_head_dim` does the same; this one lays both side by side,
    so that `joint`, what absorbed attention has for keys, needs no copy. Appended are latents after their norm and rope
    keys after their rotation. Nothing waits for the device while all rows are equally long.

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
        check_least("kv_lora_rank", kv_lora_rank, 1)
        check_least("qk_rope_head_dim", qk_rope_head_dim, 1)
        super().__init__(batch_size, 1, max_length, kv_lora_rank, qk_rope_head_dim, dtype, device)
        self._joint = Storage(batch_size, 1, max_length, kv_lora_rank + qk_rope_head_dim, self.dtype, self.device)
        self._halves: tuple[Tensor, Tensor, Tensor] | None = None  # the memory, its latents and its rope keys

    def joint(self) -> Tensor:
        """Latents and rope keys side by side, `[B, 1, length, kv_lora_rank + qk_rope_head_dim]`, not copied."""
        return self._joint.read_all(self.length)

    def stored(self) -> Stored:
        joint = self._joint.parts[0]
        if torch.compiler.is_compiling():
            return self._stored((joint[..., : self.head_dim],), (joint[..., self.head_dim :],))
        if self._halves is None or self._halves[0] is not joint:  # cutting costs as much as a launch
            self._halves = joint, joint[..., : self.head_dim], joint[..., self.head_dim :]
        return self._stored((self._halves[1],), (self._halves[2],))

    def _storages(self) -> tuple[Storage, ...]:
        return (self._joint,)

    def _write(self, k: Tensor, v: Tensor, counts: list[int] | None) -> None:
        new = torch.cat([k, v], dim=-1)
        if self.uniform:  # what lands past a row's end is dead, and the next append writes over it
            self._joint.write_all(self.length, new if counts is None else new[:, :, : max(counts)])
            return
        at = places(self.lengths, new.shape[2], counts, self.batch_size, self.device)
        self._joint.write(at.rows, at.positions, at.of(new))

    def _read(self) -> tuple[Tensor, Tensor]:
        joint = self.joint()
        return joint[..., : self.head_dim], joint[..., self.head_dim :]

    def _move(self, indices: Tensor, in_place: bool) -> None:
        if in_place:
            self._joint.reorder(indices, self.length)
        else:
            self._joint.select(indices)
