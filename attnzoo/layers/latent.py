"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434; V3, arXiv:2412.19437): keys and values of low rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnzoo.caches import Cache
from attnzoo.layers.inputs import check_inputs, check_positions, check_reach, zero_padding
from attnzoo.layers.latent_inputs import Form, absorbed_costs_less, check_latent_call, check_latent_sizes, latent_scale
from attnzoo.layers.rope import RotaryEmbedding
from attnzoo.layers.rotation import rotate_new
from attnzoo.masks import Causal, Mask
from attnzoo.ops import attention, decode, latent_decode
from attnzoo.ops.decoding import KeyValues
from attnzoo.ops.latent import Held


class MultiHeadLatentAttention(nn.Module):
    """Project down, rotate, cache, attend in one of two equal forms, project.

    Each token has one latent, from which every head's keys and values are projected up, and one rope key, which all
    heads share and which alone carries the position. The materialised form makes those keys and values; the absorbed
    one moves the up-projections into queries and outputs and attends to the latents themselves. Parameters have the
    names of DeepSeek's.

    Args:
        dim: width of inputs and outputs.
        num_heads: heads.
        kv_lora_rank: size of a latent.
        qk_nope_head_dim: size of the part of a head's queries and keys that does not rotate.
        qk_rope_head_dim: size of the part that rotates, even.
        v_head_dim: size of a head's values.
        q_lora_rank: queries go through a latent of this size too; None: straight.
        rope: rotates the rope parts; its layout is "interleaved" in DeepSeek's models (`rope_interleave`) and "half" in
            MiniCPM3's. None: no positions.
        mask: which query sees which key; None: all.
        bias: of `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj` (`attention_bias`); the others have none.
        dropout: of attention weights, in training.
        scale: of the scores; None: `(qk_nope_head_dim + qk_rope_head_dim) ** -0.5`, times the square of yarn's
            magnitude if the rope's scaling has `mscale_all_dim`, as in DeepSeek's models.
        norm: RMSNorm of the latents; False: none (for a model that was converted and is now trained).
        norm_eps: of the norms.

    Raises:
        ValueError: for sizes below 1, an odd qk_rope_head_dim, a rope of another one, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        q_lora_rank: int | None = None,
        rope: RotaryEmbedding | None = None,
        mask: Mask | None = Causal(),
        bias: bool = False,
        dropout: float = 0.0,
        scale: float | None = None,
        norm: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "num_heads": num_heads, "kv_lora_rank": kv_lora_rank, "qk_nope_head_dim": qk_nope_head_dim}
        sizes |= {"qk_rope_head_dim": qk_rope_head_dim, "v_head_dim": v_head_dim}
        check_latent_sizes({**sizes, "q_lora_rank": q_lora_rank}, mask, rope, dropout)
        self.dim, self.num_heads, self.kv_lora_rank, self.q_lora_rank = dim, num_heads, kv_lora_rank, q_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim = qk_nope_head_dim, qk_rope_head_dim
        self.qk_head_dim, self.v_head_dim = qk_nope_head_dim + qk_rope_head_dim, v_head_dim
        self.mask, self.rope, self.dropout = mask, rope, dropout
        self.scale = latent_scale(self.qk_head_dim, rope) if scale is None else scale
        if q_lora_rank is None:
            self.q_proj = nn.Linear(dim, num_heads * self.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(dim, q_lora_rank, bias=bias)
            self.q_a_layernorm = nn.RMSNorm(q_lora_rank, eps=norm_eps) if norm else nn.Identity()
            self.q_b_proj = nn.Linear(q_lora_rank, num_heads * self.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(dim, kv_lora_rank + qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(kv_lora_rank, eps=norm_eps) if norm else nn.Identity()
        self.kv_b_proj = nn.Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * v_head_dim, dim, bias=bias)

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        positions: Tensor | None = None,
        key_lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        form: Form = "auto",
    ) -> Tensor:
        """Attend within `x`, within each packed document of `x`, or to a cache and `x`.

        Args:
            x: `[B, S, dim]`.
            context: refused; rope keys are positions, so there is no cross-attention.
            positions: `[S]`, `[1, S]` or `[B, S]` integers, for the rotation only; the mask counts tokens. None: from 0
                in each row and document, or on from what the cache holds. With a cache they must rise along a row.
            key_lengths: `[B]` integers, how many of x's tokens are real; the rest is right padding, which no real token
                sees and no cache keeps.
            cu_seqlens: `[N + 1]` int32, starts and end of documents packed into one row (B == 1), which do not see one
                another. What follows the last end is padding.
            cache: latents and rope keys of earlier tokens, an `attnzoo.caches.LatentCache` or another of that shape;
                those of `x` are appended. It passes no gradient on.
            form: "materialised" or "absorbed", which give the same. "auto": absorbed where that takes fewer
                multiplications, with few new tokens over a cache; else materialised.

        Returns:
            `[B, S, dim]`; in padding, finite values without a meaning.

        Raises:
            ValueError: for shapes that do not fit, a full cache, options that exclude one another, an unknown form.
        """
        check_inputs(self.dim, x, None, positions, key_lengths, cu_seqlens, cache is not None)
        dropout = self.dropout if self.training else 0.0
        check_latent_call(context, form, cache, (x.shape[0], 1, self.kv_lora_rank, self.qk_rope_head_dim), dropout)
        if cache is not None:
            check_reach(cache, self.mask)
            if positions is not None:
                check_positions(positions, key_lengths, cache)
        x = zero_padding(x, key_lengths, cu_seqlens)
        q_nope, q_rope = self.project_q(x)
        latent, rope_key = self.project_kv(x)
        if self.rope is not None:
            where = {"positions": positions, "key_lengths": key_lengths, "cu_seqlens": cu_seqlens}
            q_rope, rope_key = rotate_new(self.rope, q_rope, rope_key, **where, cache=cache)
        if cache is not None:
            starts = cache.length if cache.uniform else cache.lengths
            absorbed = self._absorbs(form, x.shape[1], cache.length)
            seen = cache.extend(latent, rope_key, key_lengths)
            return self.merge(self._decode(q_nope, q_rope, seen, starts, absorbed))
        if form == "absorbed":
            q_nope, k = self.absorb(q_nope), torch.cat([latent, rope_key], dim=-1)
            v = k  # wider than a latent, but PyTorch's fused kernels want values as wide as keys
        else:
            k, v = self.expand(latent, rope_key)
        q, mask, scale = torch.cat([q_nope, q_rope], dim=-1), self.mask, self.scale
        out = attention(
            q, k, v, mask=mask, scale=scale, dropout_p=dropout, key_lengths=key_lengths, cu_seqlens_q=cu_seqlens
        )
        return self.merge(self.unabsorb(out[..., : self.kv_lora_rank]) if form == "absorbed" else out)

    def project_q(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both parts of the queries of `x [B, S, dim]`, not rotated: `[B, H, S, nope]` and `[B, H, S, rope]`."""
        if self.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            low = self.q_a_proj(x)
            q = self.q_b_proj(self.q_a_layernorm(low).to(low.dtype))
        q = q.unflatten(-1, (self.num_heads, self.qk_head_dim)).transpose(1, 2)
        return q[..., : self.qk_nope_head_dim], q[..., self.qk_nope_head_dim :]

    def project_kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents, normalised, `[B, 1, S, kv_lora_rank]`, and rope keys, not rotated, `[B, 1, S, rope]`."""
        low = self.kv_a_proj_with_mqa(x).unsqueeze(1)
        latent, rope_key = low[..., : self.kv_lora_rank], low[..., self.kv_lora_rank :]
        # Autocast lets a norm give fp32; back, so that latents and rope keys fit one cache.
        return self.kv_a_layernorm(latent).to(low.dtype), rope_key

    def expand(self, latent: Tensor, rope_key: Tensor) -> tuple[Tensor, Tensor]:
        """Every head's keys `[B, H, n, nope + rope]` and values `[B, H, n, v]`."""
        kv = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_nope, v = kv[..., : self.qk_nope_head_dim], kv[..., self.qk_nope_head_dim :]
        return torch.cat([k_nope, rope_key.expand(-1, self.num_heads, -1, -1)], dim=-1), v

    def absorb(self, q_nope: Tensor) -> Tensor:
        """Queries in latent space, `[B, H, S, kv_lora_rank]`: `q W_UK`, so that `(q W_UK) c = q (W_UK c)`."""
        return torch.einsum("bhsn,hnr->bhsr", q_nope, self._up_projections()[:, : self.qk_nope_head_dim])

    def unabsorb(self, out: Tensor) -> Tensor:
        """Sums of latents `[B, H, S, kv_lora_rank]` to sums of values `[B, H, S, v]`."""
        return torch.einsum("bhsr,hvr->bhsv", out, self._up_projections()[:, self.qk_nope_head_dim :])

    def merge(self, out: Tensor) -> Tensor:
        """Heads `[B, H, S, v]` to `[B, S, dim]`."""
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _up_projections(self) -> Tensor:
        return self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))  # [H, nope + v, R]

    def _absorbs(self, form: Form, new: int, held: int) -> bool:
        if form != "auto" or held == 0:
            return form == "absorbed"
        return absorbed_costs_less(new, held + new, self.kv_lora_rank, self.qk_nope_head_dim, self.v_head_dim)

    def _decode(self, q_nope: Tensor, q_rope: Tensor, seen: KeyValues, starts: int | Tensor, absorbed: bool) -> Tensor:
        if absorbed:
            q = self.absorb(q_nope)
            return self.unabsorb(latent_decode(q, q_rope, seen, mask=self.mask, scale=self.scale, starts=starts))
        held = Held(seen, *self.expand(*seen.view()))
        return decode(torch.cat([q_nope, q_rope], dim=-1), held, mask=self.mask, scale=self.scale, starts=starts)
