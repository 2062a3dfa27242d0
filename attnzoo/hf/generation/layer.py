"""One layer's memory behind transformers' `Cache`: what `generate()` fills, and what decoding kernels read in place.

It hands the attention function the new keys and values alone, marked with where they belong. The
attention function finds the mark, stores them, and attends over the cache's own memory: nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from attnzoo import ops
from attnzoo.caches import RollingCache
from attnzoo.caches.token_cache import TokenCache
from attnzoo.hf.generation.device import Clock, OnDevice
from attnzoo.hf.generation.rows import check_padding, lay, restore
from attnzoo.masks import Mask
from attnzoo.ops.decoding import KeyValues

if TYPE_CHECKING:
    from attnzoo.hf.generation.cache import HeldCache

Make = Callable[[Tensor, Tensor], TokenCache]
Fresh = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Over = Callable[[Tensor, KeyValues, int | Tensor | None], Tensor]


class HeldLayer(CacheLayerMixin):
    """One layer's memory where transformers expects keys and values.

    It counts the tokens of the padded batch, as transformers does; the memory holds real tokens only.

    Args:
        make: the layer's empty cache, from the first keys `[B, Hk, S, D]` and values `[B, Hk, S, Dv]`.
        room: tokens that a row of the padded batch may have.
    """

    is_compileable = False
    is_sliding = False  # the masks that the model makes span everything; the attention function knows the window
    supports_early_init = False

    def __init__(self, make: Make, room: int) -> None:
        super().__init__()
        self.make, self.room = make, room
        self.owner: HeldCache | None = None
        self.memory: TokenCache | None = None
        self.device_side: OnDevice | None = None  # while steps are captured and replayed
        self.seen = 0
        self.waiting = False  # for the attention function

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.memory = self.make(key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values, marked; they are stored when they are attended to.

        Raises:
            ValueError: if there is no room, or the model's layers do not pass on what they got here.
        """
        if self.waiting:
            raise ValueError(
                "this model does not hand the cache's keys to its attention function as they are; "
                "generate without a cache of attnzoo.hf.cache_for"
            )
        new = key_states.shape[2]
        if self.device_side is None and self.seen + new > self.room:
            raise ValueError(f"cache full: it holds {self.seen} tokens of max_length {self.room}, and {new} more came")
        if self.memory is None:
            self.lazy_initialization(key_states, value_states)
        self.waiting = True
        key_states.attnzoo_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pattern: Mask, **options: Any) -> Tensor:
        """Store `k [B, Hk, S, D]` and `v`, and attend to everything from `q [B, Hq, S, D]`: `[B, Hq, S, Dv]`.

        Args:
            q, k, v: of the new tokens; padding among them may be on either side.
            mask: what `attnzoo_mask` made.
            pattern: which query sees which key.
            options: scale, softcap, sinks.
        """

        def fresh(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
            return ops.attention(q, k, v, mask=pattern, key_lengths=lengths, **options)

        def over(q: Tensor, held: KeyValues, starts: int | Tensor | None) -> Tensor:
            return ops.decode(q, held, mask=pattern, starts=starts, **options)

        return self.run(q, k, v, mask, pattern, fresh, over)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pattern: Mask, fresh: Fresh, over: Over
    ) -> Tensor:
        """As `attend`, with ways of its own.

        Args:
            q, k, v, mask, pattern: as of `attend`.
            fresh: attention of the new tokens among themselves, from q, k, v and how many of each row's are real.
            over: attention over memory, from q, the memory and each row's first position.
        """
        assert self.memory is not None and self.owner is not None
        self.waiting = False
        if self.device_side is not None:
            self.device_side.write(k, v)
            return over(q, self.device_side, self.device_side.clock.before)
        rows = self.owner.rows_of(mask, (q.shape[0], q.shape[2]), self.seen)
        starts = self.memory.length if self.memory.uniform else self.memory.lengths
        if mask is not None and mask.device.type == "cpu":
            check_padding(mask, rows, pattern, self.seen, starts)
        q, k, v = (lay(rows, t) for t in (q, k, v))
        self.seen += q.shape[2]
        if self.memory.length == 0:
            self.memory.append(k, v, rows.lengths)
            return restore(rows, fresh(q, k, v, rows.lengths))
        held = self.memory.extend(k, v, rows.lengths)
        return restore(rows, over(q, held, None if rows.lengths is None else starts))

    def enter(self, clock: Clock) -> None:
        """From here on lengths are counted on the device, by `clock`."""
        assert self.memory is not None
        self.device_side = OnDevice(self.memory, clock, self.room)

    def leave(self, steps: int) -> None:
        """Count on the host again, after `steps` tokens a row."""
        assert self.device_side is not None
        self.device_side.count(steps)
        self.device_side = None
        self.seen += steps

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return self.room

    get_max_cache_shape = get_max_length  # its name in older releases

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the newest tokens can be taken back."""
        return self.memory is not None and not isinstance(self.memory, RollingCache)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest `-tokens_to_remove` tokens; a positive number is the length to keep."""
        count = self.seen - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if count <= 0 or self.memory is None:
            return
        self.memory.crop(torch.tensor([max(row - count, 0) for row in self.memory.row_lengths()]))
        self.seen -= count

    def activate_past_recording(self) -> None:
        """Nothing: what was appended can be cropped, or never (a rolling cache)."""

    def offload(self) -> None:
        """Nothing: the memory stays where it is."""

    def prefetch(self) -> None:
        """Nothing: see `offload`."""

    def reset(self) -> None:
        if self.memory is not None:
            self.memory.reset()
        self.seen, self.waiting = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.memory is not None:
            self.memory.reorder(beam_idx.to(self.memory.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.memory is not None:
            indices = torch.as_tensor(indices, device=self.memory.device)
            self.memory.select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.memory is not None:
            self.memory.repeat(repeats)
