"""The state of a linear attention layer as one layer of a transformers cache."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from attnzoo.caches import RecurrentStateCache


@dataclass(frozen=True)
class _Record:
    """What undoes the last tokens: the state before them, and they themselves."""

    before: RecurrentStateCache
    features: Tensor
    values: Tensor
    keys: Tensor | None
    lengths: Tensor | None


class RecurrentLayer(CacheLayerMixin):
    """A `RecurrentStateCache` where transformers expects keys and values.

    It counts the tokens of the padded batch, as its neighbours with keys do, since models take positions and the sizes
    of their masks from any layer of a cache. It takes the place of the layer that transformers made.

    Args:
        replaced: that layer; its kind and its size decide what masks the model makes.
    """

    is_compileable = False
    supports_early_init = False

    def __init__(self, replaced: Any = None) -> None:
        super().__init__()
        self.is_sliding = bool(getattr(replaced, "is_sliding", False))
        self._size = replaced.max_cache_len if isinstance(replaced, StaticLayer) else None
        self.state: RecurrentStateCache | None = None
        self.seen = 0
        self.new_lengths: Tensor | None = None  # of right-padded tokens that come without a mask
        self.before: Tensor | None = None  # tokens of each row on the device, while steps count there (see `enter`)
        self.record_past = bool(getattr(replaced, "record_past", False))
        self._record: _Record | None = None
        self._closed = False

    def append(
        self, features: Tensor, values: Tensor, lengths: Tensor | None, keys: Tensor | None, *, done: bool
    ) -> None:
        """Count new tokens, and add them to the state unless that is `done`; see `RecurrentStateCache.append`."""
        assert self.state is not None
        if not done:
            self.state.append(features, values, lengths, keys=keys)
        self.seen += features.shape[2]
        self.is_initialized = True

    def record(self, features: Tensor, values: Tensor, lengths: Tensor | None, keys: Tensor | None) -> None:
        """Before new tokens: keep what is needed to take them back, if `activate_past_recording` was called."""
        assert self.state is not None
        if self.record_past:
            before = copy.deepcopy(self.state)
            parts = [None if t is None else t.detach() for t in (features, values, keys)]
            self._record = _Record(before, parts[0], parts[1], parts[2], lengths)  # type: ignore[arg-type]

    def enter(self, before: Tensor) -> None:
        """From here on steps of one token a row change the state in place and count nothing: they can be captured.

        `before [B]` is how many tokens each row has, which somebody else counts.
        """
        self.before = before

    def leave(self, steps: int) -> None:
        """Count `steps` such tokens."""
        assert self.state is not None
        self.before = None
        self.state.advance(steps, None)
        self.seen += steps

    def close(self) -> None:
        """After packed documents: there is no one state to go on from."""
        self._closed = True

    def check_open(self) -> None:
        """ValueError if the cache was given with packed documents before."""
        if self._closed:
            raise ValueError(
                "past_key_values came with packed documents before, which leave no state to go on from; "
                "give a new cache, or use_cache=False"
            )

    def activate_past_recording(self) -> None:
        self.record_past = True

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the newest tokens can be taken back."""
        return self.record_past

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens, of the last call only, with `activate_past_recording`; a positive number is the
        length to keep."""
        count = self.seen - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if count > 0:
            last, self._record = self._record, None
            if last is None or count > last.features.shape[2]:
                raise ValueError(
                    f"tokens_to_remove is {tokens_to_remove}: a recurrent state takes back tokens of the last call "
                    "only, and only after activate_past_recording()"
                )
            kept = last.features.shape[2] - count
            parts = [t if t is None else t[:, :, :kept] for t in (last.features, last.values, last.keys)]
            lengths = None if last.lengths is None else last.lengths.clamp(max=kept)
            self.state, self.seen = last.before, self.seen - last.features.shape[2]
            self.append(parts[0], parts[1], lengths, parts[2], done=False)  # type: ignore[arg-type]
        self._record = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """A ValueError: keys and values are not kept."""
        raise ValueError("this layer of the cache holds a linear attention layer's state, and takes no keys and values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.seen + query_length if self._size is None else self._size), 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1 if self._size is None else self._size

    get_max_cache_shape = get_max_length  # its name in older releases

    def offload(self) -> None:
        """Nothing: the state is small, and stays where it is."""

    def prefetch(self) -> None:
        """Nothing: see `offload`."""

    def reset(self) -> None:
        self.state, self.seen, self._record, self._closed = None, 0, None, False
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state.repeat(repeats)
        self._record = None

    def _select(self, indices: Tensor) -> None:
        if self.state is not None:
            indices = torch.as_tensor(indices, device=self.state.device)
            self.state.select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)
        self._record = None


def recurrent_layer(cache: Cache, number: int) -> RecurrentLayer:
    """The cache's layer of that number, made a `RecurrentLayer` if it is not one yet.

    Raises:
        ValueError: if it holds keys and values already.
    """
    while len(cache.layers) <= number:  # transformers adds layers as they come
        cache.layers.append(DynamicLayer())
    layer = cache.layers[number]
    if isinstance(layer, RecurrentLayer):
        return layer
    if layer.is_initialized:
        raise ValueError(
            f"past_key_values holds keys and values for layer {number}, a linear attention layer, which takes a state; "
            "give a new cache"
        )
    cache.layers[number] = new = RecurrentLayer(layer)
    return new
