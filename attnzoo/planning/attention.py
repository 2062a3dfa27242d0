"""Attention mechanisms on paper: parameters, arithmetic, memory traffic and cache of one layer.

Sizes are in numbers of a vector, caches and traffic in bytes. `size` is always the bytes of one number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from attnzoo.masks import Mask
from attnzoo.ops.decoding.reach import first_tokens, reach
from attnzoo.planning.visible import visible_pairs, visible_to_last
from attnzoo.planning.weights import Weights, matrix, vectors

FP32 = 4
RESIDUAL = 64  # newest tokens that an Int8Cache holds in full besides


class Attention(ABC):
    """One layer's attention."""

    @property
    def bounded(self) -> bool:
        """Whether the mask bounds what a cache has to hold."""
        return False

    @abstractmethod
    def weights(self, dim: int) -> Weights:
        """Parameters, in a model of width `dim`."""

    @abstractmethod
    def flops(self, tokens: int) -> int:
        """FLOPs of a forward pass over `tokens`, but for those with the weights; a multiply-add counts as two."""

    @abstractmethod
    def decode_flops(self, tokens: int) -> int:
        """The same for one new token, the last of `tokens`."""

    @abstractmethod
    def cache_bytes(self, tokens: int, size: int) -> int:
        """What one sequence's cache takes, allocated for `tokens`."""

    @abstractmethod
    def decode_bytes(self, tokens: int, size: int) -> int:
        """What of the cache moves for one new token, the last of `tokens`."""

    @abstractmethod
    def standard_bytes(self, tokens: int, size: int) -> int:
        """Traffic of a forward pass that writes the scores out, Theta(N d + N^2) (arXiv 2205.14135)."""

    @abstractmethod
    def tiled_bytes(self, tokens: int, size: int, sram: int) -> int:
        """Traffic of a forward pass in tiles that fit into `sram` bytes, Theta(N^2 d^2 / M) (arXiv 2205.14135)."""


@dataclass(frozen=True)
class Softmax(Attention):
    """Grouped-query attention; MHA and MQA are its ends.

    Attributes:
        mask: which query sees which key; None: causal.
        qk_norm: norms of each head, of the whole width of queries and of keys, or none.
        int8: the cache is an `Int8Cache`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    mask: Mask | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["head", "width"] | None = None
    sinks: bool = False
    int8: bool = False

    @property
    def bounded(self) -> bool:
        return reach(self.mask, first_tokens(self.mask)) is not None

    def weights(self, dim: int) -> Weights:
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        projections = (
            matrix(dim, queries, bias=self.qkv_bias)
            + matrix(dim, keys, bias=self.qkv_bias)
            + matrix(dim, self.num_kv_heads * self.v_head_dim, bias=self.qkv_bias)
            + matrix(self.num_heads * self.v_head_dim, dim, bias=self.out_bias)
        )
        norms = {"head": 2 * self.head_dim, "width": queries + keys, None: 0}[self.qk_norm]
        return projections + vectors(norms + self.sinks * self.num_heads)

    def flops(self, tokens: int) -> int:
        return 2 * self.num_heads * (self.head_dim + self.v_head_dim) * visible_pairs(self.mask, tokens)

    def decode_flops(self, tokens: int) -> int:
        return 2 * self.num_heads * (self.head_dim + self.v_head_dim) * visible_to_last(self.mask, tokens)

    def cache_bytes(self, tokens: int, size: int) -> int:
        # No ring of int8 so far.
        held = tokens if self.int8 else held_tokens(self.mask, tokens, first_tokens(self.mask))
        recent = RESIDUAL * self.num_kv_heads * (self.head_dim + self.v_head_dim) * size if self.int8 else 0
        return held * self._slot(size) + recent

    def decode_bytes(self, tokens: int, size: int) -> int:
        return visible_to_last(self.mask, tokens) * self._slot(size)

    def standard_bytes(self, tokens: int, size: int) -> int:
        return size * (self._ends(tokens) + self._keys(tokens) + 4 * self.num_heads * tokens**2)

    def tiled_bytes(self, tokens: int, size: int, sram: int) -> int:
        return size * (self._ends(tokens) + self.streamed(tokens, size, sram))

    def streamed(self, tokens: int, size: int, sram: int) -> int:
        """Keys and values that reach the chip: all once, or those that are visible once a block of queries.

        A block has `M / (2 (d + dv))` rows (`M / 4d` in the paper), M being how many numbers `sram` holds.
        """
        wide = self.head_dim + self.v_head_dim
        rows = max(1, sram // size // (2 * wide))
        return max(self._keys(tokens), self.num_heads * wide * visible_pairs(self.mask, tokens) // rows)

    def _ends(self, tokens: int) -> int:
        """Queries in, outputs out."""
        return tokens * self.num_heads * (self.head_dim + self.v_head_dim)

    def _keys(self, tokens: int) -> int:
        return tokens * self.num_kv_heads * (self.head_dim + self.v_head_dim)

    def _slot(self, size: int) -> int:
        numbers = self.head_dim + self.v_head_dim
        return self.num_kv_heads * (numbers + 2 * FP32 if self.int8 else numbers * size)


@dataclass(frozen=True)
class Latent(Attention):
    """MLA (arXiv 2405.04434): materialised in a forward pass, absorbed in decoding."""

    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    mask: Mask | None = None
    bias: bool = False
    int8: bool = False

    @property
    def bounded(self) -> bool:
        return reach(self.mask) is not None

    def weights(self, dim: int) -> Weights:
        queries = self.num_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        if self.q_lora_rank is None:
            q = matrix(dim, queries)
        else:
            rank = self.q_lora_rank
            q = matrix(dim, rank, bias=self.bias) + vectors(rank) + matrix(rank, queries)
        down = matrix(dim, self.kv_lora_rank + self.qk_rope_head_dim, bias=self.bias) + vectors(self.kv_lora_rank)
        up = matrix(self.kv_lora_rank, self.num_heads * (self.qk_nope_head_dim + self.v_head_dim))
        return q + down + up + matrix(self.num_heads * self.v_head_dim, dim, bias=self.bias)

    def flops(self, tokens: int) -> int:
        return self._materialised.flops(tokens)

    def decode_flops(self, tokens: int) -> int:
        # The up-projections into queries and out of latents are kv_b_proj, and counted with the weights.
        return 2 * self.num_heads * (self._kept + self.kv_lora_rank) * visible_to_last(self.mask, tokens)

    def cache_bytes(self, tokens: int, size: int) -> int:
        held = tokens if self.int8 else held_tokens(self.mask, tokens)
        return held * self._slot(size) + (RESIDUAL * self._kept * size if self.int8 else 0)

    def decode_bytes(self, tokens: int, size: int) -> int:
        return visible_to_last(self.mask, tokens) * self._slot(size)

    def standard_bytes(self, tokens: int, size: int) -> int:
        return self._materialised.standard_bytes(tokens, size)

    def tiled_bytes(self, tokens: int, size: int, sram: int) -> int:
        return self._materialised.tiled_bytes(tokens, size, sram)

    @property
    def _materialised(self) -> Softmax:
        key = self.qk_nope_head_dim + self.qk_rope_head_dim
        return Softmax(self.num_heads, self.num_heads, key, self.v_head_dim, self.mask)

    @property
    def _kept(self) -> int:
        """Numbers of a token that are cached."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def _slot(self, size: int) -> int:
        return self._kept + 2 * FP32 if self.int8 else self._kept * size


def held_tokens(mask: Mask | None, tokens: int, prefix: int = 0) -> int:
    """Tokens that a cache has to hold: those that a query looks back to, where the mask bounds them, and a prefix."""
    far = reach(mask, prefix)
    return tokens if far is None else min(far + prefix, tokens)
