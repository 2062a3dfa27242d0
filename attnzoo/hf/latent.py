"""The latent attention layer that `attnzoo.swap` puts into a transformers model."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from attnzoo import ops
from attnzoo.conversion.families import Family, Geometry, Projections
from attnzoo.conversion.latent import RopePart
from attnzoo.hf.attention import layer_of, masked_attention, refuse_unsupported
from attnzoo.hf.latent_weights import factored
from attnzoo.hf.layers import narrowed, offsets
from attnzoo.hf.weights import check_implementation, dropout_of, own_cache, scale_of, softcap_of, take_place
from attnzoo.layers import MultiHeadLatentAttention
from attnzoo.layers.latent_inputs import absorbed_costs_less
from attnzoo.layers.rope import apply_rotary
from attnzoo.masks import Mask
from attnzoo.ops.decoding import KeyValues
from attnzoo.specs import MLA


class SwappedLatentAttention(MultiHeadLatentAttention):
    """Latent attention with a transformers layer's forward: RoPE, cache and masks are the model's.

    In the model's cache lie latents in the place of keys and rope keys in the place of values, so whatever the cache
    can do (static, sliding, offloaded, beams, crop) it does with them. The latent has no norm.

    Args:
        old: the layer that it takes the place of.
        projections: its weights.
        trained: bool; any weight that is trained lets all of the new ones be.
        family, geometry: where they come from.
        spec: with all sizes.
        rope: what rotates, before and after.
        mask: which query sees which key.
        narrower: whether `mask` hides keys that the model's own mask shows.
    """

    layer_idx: int
    resid_dropout: nn.Module | None

    def __init__(
        self,
        old: nn.Module,
        projections: Projections,
        trained: Projections,
        family: Family,
        geometry: Geometry,
        spec: MLA,
        rope: RopePart,
        *,
        mask: Mask,
        narrower: bool,
    ) -> None:
        assert spec.kv_lora_rank and spec.qk_nope_head_dim and spec.qk_rope_head_dim and spec.v_head_dim
        with torch.device("meta"):
            super().__init__(
                geometry.dim,
                geometry.num_heads,
                kv_lora_rank=spec.kv_lora_rank,
                qk_nope_head_dim=spec.qk_nope_head_dim,
                qk_rope_head_dim=spec.qk_rope_head_dim,
                v_head_dim=spec.v_head_dim,
                q_lora_rank=spec.q_lora_rank,
                mask=mask,
                dropout=dropout_of(old),
                scale=scale_of(old),
                norm=False,
            )
        self.geometry, self.spec, self.narrower, self.softcap = geometry, spec, narrower, softcap_of(old, family)
        take_place(self, old)
        self.pairs = list(rope.planes) if rope.rotary_dim else None
        gains = [_gain(getattr(old, name, None)) for name in ("q_norm", "k_norm")]
        weights = factored(replace(projections, q_norm=gains[0], k_norm=gains[1]), spec, rope, self.scale)
        trains = any(bool(t[(0,) * t.ndim]) for t in vars(trained).values() if t is not None and not t.is_meta)
        for name, tensor in weights.named().items():
            linear, _, kind = name.partition(".")
            setattr(getattr(self, linear), kind, nn.Parameter(tensor, requires_grad=trains))

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        layer_past: Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """What the model's block calls; the arguments are those of `SwappedAttention`."""
        check_implementation(self)
        refuse_unsupported(self, kwargs)
        q_nope, q_rope = self.project_q(hidden_states)
        latent, rope_key = self.project_kv(hidden_states)
        if position_embeddings is not None and self.pairs is not None:
            pairs = _indices(tuple(self.pairs), hidden_states.device)
            cos, sin = (table[..., pairs] for table in position_embeddings)
            q_rope, rope_key = apply_rotary(q_rope, cos, sin), apply_rotary(rope_key, cos, sin)
        cache = own_cache(past_key_values, layer_past)
        new = hidden_states.shape[1]
        first_query, first_key = offsets(cache, self.layer_idx, new)
        if cache is not None:
            latent, rope_key = cache.update(latent, rope_key, self.layer_idx)
        keys = latent.shape[2]
        assert self.mask is not None
        if (held := layer_of(latent)) is not None:
            q = torch.cat([q_nope, q_rope], dim=-1)
            out = held.run(q, latent, rope_key, attention_mask, self.mask, self._fresh, self._over)
            out = self.merge(out)
            return (out if self.resid_dropout is None else self.resid_dropout(out)), None
        if self.narrower:
            attention_mask = narrowed(attention_mask, self.mask, first_query, first_key, new, keys)
        sizes = self.kv_lora_rank, self.qk_nope_head_dim, self.v_head_dim
        absorbed = keys > new and absorbed_costs_less(new, keys, *sizes)
        if absorbed:
            q_nope = self.absorb(q_nope)
            k = v = torch.cat([latent, rope_key], dim=-1)  # one head for all, as wide as fused kernels want
        else:
            k, v = self.expand(latent, rope_key)
        out = masked_attention(
            torch.cat([q_nope, q_rope], dim=-1),
            k,
            v,
            attention_mask,
            pattern=self.mask,
            cu_seqlens_q=cu_seq_lens_q,
            cu_seqlens_k=cu_seq_lens_k,
            scale=self.scale,
            softcap=self.softcap,
            dropout_p=self.dropout if self.training else 0.0,
        )
        out = self.merge(self.unabsorb(out[..., : self.kv_lora_rank]) if absorbed else out)
        return (out if self.resid_dropout is None else self.resid_dropout(out)), None

    def _fresh(self, q: Tensor, latent: Tensor, rope_key: Tensor, lengths: Tensor | None) -> Tensor:
        """Attention of a prompt within itself, `[B, H, S, v_head_dim]`; `lengths` of its tokens are real."""
        k, v = self.expand(latent, rope_key)
        return ops.attention(q, k, v, mask=self.mask, scale=self.scale, softcap=self.softcap, key_lengths=lengths)

    def _over(self, q: Tensor, held: KeyValues, starts: int | Tensor | None) -> Tensor:
        """Attention over a cache of latents, where they stand."""
        if self.softcap is not None:
            raise ValueError("latent attention with a softcap has no kernel over a cache of attnzoo.hf.cache_for")
        q_nope, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        q_latent = self.absorb(q_nope)
        return self.unabsorb(ops.latent_decode(q_latent, q_rope, held, scale=self.scale, mask=self.mask, starts=starts))


@lru_cache(maxsize=64)
def _indices(places: tuple[int, ...], device: torch.device) -> Tensor:
    """The places as a tensor, made once: a list would be copied to the device at every call, and in no CUDA graph."""
    return torch.tensor(places, device=device)


def _gain(norm: nn.Module | None) -> Tensor | None:
    """What a per-head norm multiplies a normalised head with."""
    if norm is None:
        return None
    with torch.no_grad():
        return norm(torch.ones_like(next(norm.parameters()))).detach()  # type: ignore[no-any-return]
