"""Grouped-query attention (arXiv:2305.13245): heads of queries share the keys and values of their group."""

from __future__ import annotations

from torch import Tensor, nn

from attnzoo.caches import Cache
from attnzoo.layers.inputs import check_cache, check_inputs, check_positions, check_reach, check_sizes, zero_padding
from attnzoo.layers.rope import RotaryEmbedding
from attnzoo.layers.rotation import rotate_new
from attnzoo.masks import Causal, Mask
from attnzoo.ops import attention, decode


class GroupedQueryAttention(nn.Module):
    """Project, rotate, cache, attend, project.

    Args:
        dim: width of inputs and outputs.
        num_heads: heads of queries.
        num_kv_heads: heads of keys and values; divides `num_heads`. Neighbouring query heads share one.
        head_dim: size of a head; None: `dim // num_heads`.
        bias: of the query, key and value projections.
        out_bias: of the output projection; None: as `bias`.
        qk_norm: RMSNorm (eps 1e-6) over each head of queries and keys, before the rotation (arXiv:2302.05442).
        mask: which query sees which key; None: all. It does not apply to a `context`.
        rope: rotates queries and keys; None: no positions.
        dropout: of attention weights, in training.
        scale: of the scores; None: `head_dim ** -0.5`.
        softcap: scores become `softcap * tanh(scores / softcap)`.

    Raises:
        ValueError: for sizes that do not divide, a rope of another head_dim, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        head_dim: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        qk_norm: bool = False,
        mask: Mask | None = Causal(),
        rope: RotaryEmbedding | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim, num_heads, num_kv_heads, head_dim, mask, rope, dropout)
        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, num_kv_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.mask, self.rope, self.dropout, self.scale, self.softcap = mask, rope, dropout, scale, softcap
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, dim, bias=bias if out_bias is None else out_bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        positions: Tensor | None = None,
        key_lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Attend within `x`, within each packed document of `x`, to a cache and `x`, or to `context`.

        Args:
            x: `[B, S, dim]`.
            context: `[B, Sc, dim]`, cross-attention: keys come from here, all are visible, nothing is rotated. With a
                cache they are projected at the first call; a cache that is not empty is used as it stands, and
                `context` and `key_lengths` are not read then.
            positions: `[S]`, `[1, S]` or `[B, S]` integers, for the rotation only; the mask counts tokens. None: from 0
                in each row and document, or on from what the cache holds. With a cache they must rise along a row.
            key_lengths: `[B]` integers, how many of x's tokens (of the context's, if there is one) are real; the rest
                is right padding, which no real token sees and no cache keeps.
            cu_seqlens: `[N + 1]` int32, starts and end of documents packed into one row (B == 1), which do not see one
                another. What follows the last end is padding.
            cache: keys and values of earlier tokens; those of `x` are appended. It passes no gradient on.

        Returns:
            `[B, S, dim]`; in padding, finite values without a meaning.

        Raises:
            ValueError: for shapes that do not fit, a full cache, options that exclude one another. Values out of range
                in `key_lengths` and `cu_seqlens` are found where that does not cost a wait for the device: on the CPU
                and with a cache.
        """
        check_inputs(self.dim, x, context, positions, key_lengths, cu_seqlens, cache is not None)
        if cache is not None:
            check_cache(cache, x.shape[0], self.num_kv_heads, self.head_dim)
            check_reach(cache, self.mask if context is None else None)
            if positions is not None:
                check_positions(positions, key_lengths, cache)
        if context is not None:
            return self.merge(self._cross(x, context, key_lengths, cache))
        x = zero_padding(x, key_lengths, cu_seqlens)
        q = self.project_q(x)
        k, v = self.project_kv(x)
        if self.rope is not None:
            q, k = rotate_new(
                self.rope, q, k, positions=positions, key_lengths=key_lengths, cu_seqlens=cu_seqlens, cache=cache
            )
        if cache is not None:
            return self.merge(self._decode(q, k, v, key_lengths, cache))
        out = attention(
            q,
            k,
            v,
            mask=self.mask,
            scale=self.scale,
            softcap=self.softcap,
            dropout_p=self.dropout if self.training else 0.0,
            key_lengths=key_lengths,
            cu_seqlens_q=cu_seqlens,
        )
        return self.merge(out)

    def project_q(self, x: Tensor) -> Tensor:
        """Queries `[B, Hq, S, D]` of `x [B, S, dim]`, normalised, not rotated."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        return (q if self.q_norm is None else self.q_norm(q).to(q.dtype)).transpose(1, 2)

    def project_kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (normalised, not rotated) and values, each `[B, Hk, S, D]`, of `x [B, S, dim]`."""
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        # Autocast lets a norm give fp32; back, so that keys and values fit one cache.
        return (k if self.k_norm is None else self.k_norm(k).to(k.dtype)).transpose(1, 2), v.transpose(1, 2)

    def merge(self, out: Tensor) -> Tensor:
        """Heads `[B, Hq, S, D]` to `[B, S, dim]`."""
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, cache: Cache) -> Tensor:
        if self.training and self.dropout > 0:
            raise ValueError(f"cache with dropout {self.dropout} in training; call eval() first")
        starts = cache.length if cache.uniform else cache.lengths
        seen = cache.extend(k, v, key_lengths)
        return decode(q, seen, mask=self.mask, scale=self.scale, softcap=self.softcap, starts=starts)

    def _cross(self, x: Tensor, context: Tensor, key_lengths: Tensor | None, cache: Cache | None) -> Tensor:
        if cache is None or cache.length == 0:
            k, v = self.project_kv(zero_padding(context, key_lengths, None))
            if cache is not None:
                cache.append(k, v, key_lengths)
        if cache is not None:
            k, v = cache.view()
            key_lengths = None if cache.uniform else cache.lengths
        return attention(
            self.project_q(x),
            k,
            v,
            scale=self.scale,
            softcap=self.softcap,
            dropout_p=self.dropout if self.training else 0.0,
            key_lengths=key_lengths,
        )
