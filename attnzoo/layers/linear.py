"""Linear attention as a module (arXiv 2006.16236): a state of constant size instead of keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.caches import Cache, RecurrentStateCache
from attnzoo.layers.feature_maps import Hedgehog, RandomFeatures
from attnzoo.layers.grouped_query import GroupedQueryAttention
from attnzoo.layers.inputs import check_inputs, zero_padding
from attnzoo.layers.linear_inputs import check_state_cache, decay_of_heads
from attnzoo.layers.rope import RotaryEmbedding
from attnzoo.layers.rotation import rotate_new
from attnzoo.masks import Causal
from attnzoo.ops.linear import State, hybrid_attention, linear_attention, linear_decode, linear_decode_in_place
from attnzoo.specs import Linear


class LinearAttention(GroupedQueryAttention):
    """Project, rotate, map, attend linearly, project; with a `window`, softmax near and linear far (LoLCATs).

    Args:
        dim: width of inputs and outputs.
        num_heads: heads of queries.
        num_kv_heads: heads of keys and values; divides `num_heads`. None: `num_heads`.
        head_dim: size of a head; None: `dim // num_heads`.
        feature_map: "elu" (elu(x) + 1, arXiv 2006.16236), "relu", "identity", "favor" (Performer's random features,
            2009.14794) or "hedgehog" (learned, 2402.04347).
        num_features: of "favor"; None: `head_dim * ln(head_dim)`.
        normalize: divide by the sum of the weights. "favor" and a window need it.
        decay: what is left of each key/value head's state after one more token, in (0, 1]; "retnet": 1 - 2^(-5 - h)
            for head h (2307.08621); None: all. Fixed, and without a window only.
        causal: a token sees itself and those before; else all of them.
        window: softmax over this many last keys, its own among them, and linear attention to those before, under one
            normaliser (2410.10254); causal only. `window_factors [num_heads]`, a parameter, weighs the near by its
            sigmoid, 0.1 at first. None: linear throughout.
        bias: of the query, key and value projections.
        out_bias: of the output projection; None: as `bias`.
        qk_norm: RMSNorm (eps 1e-6) over each head of queries and keys, before the rotation.
        rope: rotates queries and keys before the map; None: no positions.
        scale: of q . k, or of the mapped ones; None: `head_dim ** -0.5`. It cancels in a normalised result, except in a
            window's softmax and in "favor".

    Raises:
        ValueError: for sizes that do not divide and options that exclude one another.
    """

    log_decay: Tensor | None
    window_factors: nn.Parameter

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        feature_map: str = "elu",
        num_features: int | None = None,
        normalize: bool = True,
        decay: Sequence[float] | str | None = None,
        causal: bool = True,
        window: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        qk_norm: bool = False,
        rope: RotaryEmbedding | None = None,
        scale: float | None = None,
    ) -> None:
        Linear(num_kv_heads, feature_map, num_features, normalize, decay, window)  # refuses what no layer can be
        if not causal and (decay is not None or window is not None):
            raise ValueError(f"causal is False with decay {decay!r} and window {window}, which count tokens back")
        super().__init__(
            dim,
            num_heads,
            num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=head_dim,
            bias=bias,
            out_bias=out_bias,
            qk_norm=qk_norm,
            mask=Causal() if causal else None,
            rope=rope,
            scale=scale,
        )
        self.feature_map, self.normalize, self.causal, self.window = feature_map, normalize, causal, window
        self.decay = decay_of_heads(decay, self.num_kv_heads)
        self.register_buffer("log_decay", None, persistent=False)
        self._set_decay(torch.float32, self.q_proj.weight.device)
        self.learned_map: RandomFeatures | Hedgehog | None = None
        if feature_map == "favor":
            self.learned_map = RandomFeatures(self.head_dim, num_features, scale=scale)
        if feature_map == "hedgehog":
            self.learned_map = Hedgehog(num_heads, self.num_kv_heads, self.head_dim)
        # What is left for the op to apply.
        self.elementwise_map = feature_map if self.learned_map is None else "identity"
        if window is not None:
            self.window_factors = nn.Parameter(torch.full((num_heads,), math.log(0.1 / 0.9)))

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
            context: `[B, Sc, dim]`, cross-attention to all of it, without rotation; not with a window or a decay. With
                a cache (without rollback) it is summed up at the first call, and not read after that.
            positions: as of `GroupedQueryAttention`, for the rotation only.
            key_lengths: `[B]`, how many of x's tokens (or the context's) are real; the rest is right padding.
            cu_seqlens: `[N + 1]`, boundaries of documents packed into one row; each starts from an empty state.
            cache: a `RecurrentStateCache`, from `new_cache`; x's tokens are added. It passes no gradient on. Causal
                layers only.

        Returns:
            `[B, S, dim]`; in padding, finite values without a meaning.

        Raises:
            ValueError: for shapes that do not fit, another layer's cache, options that exclude one another.
        """
        check_inputs(self.dim, x, context, positions, key_lengths, cu_seqlens, cache is not None)
        state = None if cache is None else self._checked(cache, x.shape[0], context is not None)
        if context is not None:
            return self.merge(self._cross_state(x, context, key_lengths, state))
        x = zero_padding(x, key_lengths, cu_seqlens)
        q = self.project_q(x)
        k, v = self.project_kv(x)
        if self.rope is not None:
            q, k = rotate_new(
                self.rope, q, k, positions=positions, key_lengths=key_lengths, cu_seqlens=cu_seqlens, cache=cache
            )
        f_q, f_k = self.features(q, query=True), self.features(k, query=False)
        if state is not None:
            return self.merge(self.decode(q, k, v, f_q, f_k, state, key_lengths))
        return self.merge(self.attend(q, k, v, f_q, f_k, key_lengths, cu_seqlens))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        f_q: Tensor,
        f_k: Tensor,
        key_lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """`[B, Hq, S, D]` of projected heads and their `features`, without a cache."""
        if self.window is None:
            return self._linear(f_q, f_k, v, self.causal, key_lengths, cu_seqlens)
        return hybrid_attention(
            q,
            k,
            v,
            window=self.window,
            q_features=f_q,
            k_features=f_k,
            feature_map=self.elementwise_map,
            near_weight=self._near_weight(),
            scale=self.scale,
            key_lengths=key_lengths,
            cu_seqlens=cu_seqlens,
        )

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        f_q: Tensor,
        f_k: Tensor,
        cache: RecurrentStateCache,
        lengths: Tensor | None = None,
        *,
        before: Tensor | None = None,
    ) -> Tensor:
        """`[B, Hq, S, D]` of new tokens after those in the cache, which takes them in.

        With `before [B]`, the tokens of each row, on the device alone; see `linear_decode_in_place`.
        """
        q_features, k_features = (None, None) if self.learned_map is None else (f_q, f_k)
        given = {"q_features": q_features, "k_features": k_features, "near_weight": self._near_weight()}
        options: dict[str, Any] = given | {"scale": self._scale(), "lengths": lengths}
        if before is not None:
            return linear_decode_in_place(q, k, v, cache, before, **options)
        return linear_decode(q, k, v, cache, **options)

    def features(self, x: Tensor, *, query: bool) -> Tensor:
        """Features of queries `[B, Hq, S, D]` or keys `[B, Hk, S, D]`, up to the elementwise map."""
        return x if self.learned_map is None else self.learned_map(x, query=query)

    def new_cache(
        self,
        batch_size: int,
        *,
        rollback: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> RecurrentStateCache:
        """An empty cache for this layer, of its weights' dtype and device unless others are given.

        `rollback` is how many tokens a crop must be able to take back (speculative decoding).
        """
        dtype = self.k_proj.weight.dtype if dtype is None else dtype
        wide = isinstance(self.learned_map, RandomFeatures)
        return RecurrentStateCache(
            batch_size,
            self.num_kv_heads,
            self.feature_dim,
            self.head_dim,
            feature_map=self.elementwise_map,
            normalize=self.normalize,
            log_decay=self.log_decay,
            window=self.window,
            key_dim=None if self.window is None or self.learned_map is None else self.head_dim,
            rollback=rollback,
            dtype=dtype,
            feature_dtype=torch.promote_types(dtype, torch.float32) if wide else dtype,
            device=self.k_proj.weight.device if device is None else device,
        )

    @property
    def feature_dim(self) -> int:
        """Features of a key."""
        return self.head_dim if self.learned_map is None else self.learned_map.out_dim

    def _linear(
        self,
        f_q: Tensor,
        f_k: Tensor,
        v: Tensor,
        causal: bool,
        key_lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        initial_state: State | None = None,
    ) -> Tensor:
        return linear_attention(
            f_q,
            f_k,
            v,
            feature_map=self.elementwise_map,
            normalize=self.normalize,
            causal=causal,
            log_decay=self.log_decay,
            scale=self._scale(),
            key_lengths=key_lengths,
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
        )

    def _scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale  # not by the number of features

    def _near_weight(self) -> Tensor | None:
        return None if self.window is None else self.window_factors.sigmoid()

    def _cross_state(
        self, x: Tensor, context: Tensor, key_lengths: Tensor | None, cache: RecurrentStateCache | None
    ) -> Tensor:
        if self.window is not None or self.decay is not None:
            raise ValueError("context given to a layer with a window or a decay, which count tokens back")
        if cache is not None and cache.length > 0:
            context, key_lengths = context[:, :0], None
        k, v = self.project_kv(zero_padding(context, key_lengths, None))
        f_q, f_k = self.features(self.project_q(x), query=True), self.features(k, query=False)
        if cache is None:
            return self._linear(f_q, f_k, v, False, key_lengths)
        cache.append(f_k, v, key_lengths)
        return self._linear(f_q, f_k[:, :, :0], v[:, :, :0], False, initial_state=cache.state)

    def _checked(self, cache: Cache, batch: int, crossed: bool) -> RecurrentStateCache:
        if not self.causal and not crossed:
            raise ValueError("cache given to a layer that is not causal")
        sizes = batch, self.num_kv_heads, self.feature_dim, self.head_dim
        settings = {"feature_map": self.elementwise_map, "normalize": self.normalize, "window": self.window}
        return check_state_cache(cache, sizes, settings, decays=self.log_decay is not None, crossed=crossed)

    def _set_decay(self, dtype: torch.dtype, device: torch.device) -> None:
        if self.decay is not None:
            self.log_decay = torch.tensor([math.log(d) for d in self.decay], dtype=dtype, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearAttention:
        # model.bfloat16() would round the decay, and to_empty() would leave it unset: make it anew.
        super()._apply(fn, recurse)
        if self.log_decay is not None:
            self._set_decay(torch.promote_types(self.log_decay.dtype, torch.float32), self.log_decay.device)
        return self
