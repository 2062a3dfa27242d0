"""attnzoo's caches behind transformers' `Cache`: all layers of a model, and what they share."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from attnzoo.caches import Cache as Memory
from attnzoo.caches import RecurrentStateCache
from attnzoo.caches.token_cache import TokenCache
from attnzoo.hf.generation.layer import HeldLayer
from attnzoo.hf.generation.rows import new_rows
from attnzoo.hf.recurrent_cache import RecurrentLayer
from attnzoo.hf.rows import Rows


class HeldCache(Cache):
    """A transformers cache of `HeldLayer`s, and of a `RecurrentLayer` where a layer keeps a state; see `cache_for`."""

    def __init__(self, layers: list[HeldLayer | RecurrentLayer], batch_size: int, max_length: int) -> None:
        super().__init__(layers=layers)
        self.rows, self.max_length = batch_size, max_length
        self.new_lengths: Tensor | None = None  # of right-padded tokens that come without a mask
        self.moved = 0  # how often memory was rearranged: what was captured before is void
        self.beams = False
        self.stepping: Any = None  # the `Step` that counts on the device now
        self.ahead = 0  # tokens that it counted
        self._seen_mask: tuple[Tensor, int, Rows] | None = None
        for layer in layers:
            if isinstance(layer, HeldLayer):
                layer.owner = self

    @property
    def memories(self) -> list[Memory]:
        """The attnzoo caches of all layers that have one by now."""
        found = (layer.memory if isinstance(layer, HeldLayer) else layer.state for layer in self.layers)
        return [memory for memory in found if memory is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, values, latents and states held, whether filled or not."""
        return sum(m.nbytes for m in self.memories if isinstance(m, RecurrentStateCache | TokenCache))

    def rows_of(self, mask: Tensor | None, shape: tuple[int, int], seen: int) -> Rows:
        """How the new tokens are padded. A mask is read once for all layers that get it."""
        if mask is None:
            return Rows(shape, lengths=self.new_lengths)
        if self._seen_mask is None or self._seen_mask[0] is not mask or self._seen_mask[1] != seen:
            self._seen_mask = mask, seen, new_rows(mask, shape, seen)
        return self._seen_mask[2]

    def right_padded(self, lengths: Tensor | None) -> None:
        """Say of tokens that come without a mask how many of each row's are real, `[B]`; None: all."""
        self.new_lengths = lengths
        for layer in self.layers:
            if isinstance(layer, RecurrentLayer):
                layer.new_lengths = lengths

    def row_lengths(self) -> list[int]:
        """Real tokens of each row, known without asking the device."""
        return [row + self.ahead for row in self.memories[0].row_lengths()]

    def settle(self) -> None:
        """Count on the host again, if steps counted on the device."""
        if self.stepping is not None:
            self.stepping.leave()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(super().get_seq_length(layer_idx)) + self.ahead

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        keys, offset = super().get_mask_sizes(query_length, layer_idx)
        return keys + self.ahead, offset

    def reset(self) -> None:
        self._change()
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove == 0:  # as transformers asks in some loops at every step
            return
        self._change()
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change()
        self.beams = True
        super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change()
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change()
        super().batch_repeat_interleave(repeats)

    def _change(self) -> None:
        self.settle()
        self._seen_mask, self.moved = None, self.moved + 1
