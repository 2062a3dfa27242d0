"""Linear attention on paper: a state of constant size, in chunks when trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attnzoo.masks import SlidingWindow
from attnzoo.ops.linear.chunked import CHUNK
from attnzoo.planning.attention import FP32, Attention, Softmax
from attnzoo.planning.visible import visible_pairs
from attnzoo.planning.weights import Weights, matrix, vectors


@dataclass(frozen=True)
class Recurrent(Attention):
    """Linear attention (arXiv 2006.16236); with a `window`, softmax near and linear far (2410.10254).

    Attributes:
        projections: where queries, keys and values come from; its mask and cache have no part in this.
    """

    projections: Softmax
    feature_map: str = "elu"
    num_features: int | None = None
    normalize: bool = True
    window: int | None = None

    @property
    def features(self) -> int:
        """Features of a key, F."""
        d = self.projections.head_dim
        if self.feature_map == "favor":
            return max(1, int(d * math.log(d))) if self.num_features is None else self.num_features
        return 2 * d if self.feature_map == "hedgehog" else d

    def weights(self, dim: int) -> Weights:
        p = self.projections
        learned = Weights()
        if self.feature_map == "hedgehog":
            learned = matrix((p.num_heads + p.num_kv_heads) * p.head_dim, p.head_dim)
        return p.weights(dim) + learned + vectors(0 if self.window is None else p.num_heads)

    def flops(self, tokens: int) -> int:
        p = self.projections
        whole, rest = divmod(tokens, CHUNK)
        pairs = whole * visible_pairs(None, CHUNK) + visible_pairs(None, rest)
        inside = 2 * p.num_heads * (self.features + p.v_head_dim) * pairs
        return tokens * (self._state_flops + self._drawn_flops) + inside + self._near_flops(tokens)

    def decode_flops(self, tokens: int) -> int:
        near = 0 if self._near is None else self._near.decode_flops(tokens)
        return self._state_flops + self._drawn_flops + near

    def cache_bytes(self, tokens: int, size: int) -> int:
        p = self.projections
        state = FP32 * self.features * (p.v_head_dim + self.normalize)
        return p.num_kv_heads * (state + self._tail * self._slot(size))

    def decode_bytes(self, tokens: int, size: int) -> int:
        """The state is read and written, the tail read."""
        p = self.projections
        state = 2 * FP32 * self.features * (p.v_head_dim + self.normalize)
        return p.num_kv_heads * (state + min(self._tail, tokens) * self._slot(size))

    def standard_bytes(self, tokens: int, size: int) -> int:
        """The parallel form, which writes all weights out."""
        p = self.projections
        heads = p.num_heads + p.num_kv_heads
        return size * (tokens * heads * (self.features + p.v_head_dim) + 4 * p.num_heads * tokens**2)

    def tiled_bytes(self, tokens: int, size: int, sram: int) -> int:
        """The chunked form: the state stays on the chip, in as many slices of values as it takes; Theta(N d)."""
        p = self.projections
        slices = math.ceil(FP32 * self.features * p.v_head_dim / sram)
        once = tokens * (p.num_heads + p.num_kv_heads) * (self.features * slices + p.v_head_dim)
        return size * (once + (0 if self._near is None else self._near.streamed(tokens, size, sram)))

    @property
    def _state_flops(self) -> int:
        """Of one token: into the state, and out of it."""
        p = self.projections
        return 2 * (p.num_heads + p.num_kv_heads) * self.features * p.v_head_dim

    @property
    def _drawn_flops(self) -> int:
        """Of one token: through directions that are drawn and not learned, and so are no parameters."""
        p = self.projections
        return 2 * (p.num_heads + p.num_kv_heads) * p.head_dim * self.features if self.feature_map == "favor" else 0

    @property
    def _near(self) -> Softmax | None:
        if self.window is None:
            return None
        p = self.projections
        return Softmax(p.num_heads, p.num_kv_heads, p.head_dim, p.v_head_dim, SlidingWindow(self.window))

    def _near_flops(self, tokens: int) -> int:
        return 0 if self._near is None else self._near.flops(tokens)

    @property
    def _tail(self) -> int:
        """Tokens held one by one."""
        return 0 if self.window is None else self.window - 1

    def _slot(self, size: int) -> int:
        p = self.projections
        keys = p.head_dim if self.feature_map in ("favor", "hedgehog") else 0
        return size * (self.features + p.v_head_dim + keys)
