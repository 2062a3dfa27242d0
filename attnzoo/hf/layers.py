"""The attention layer that `attnzoo.swap` puts into a transformers model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from attnzoo.conversion.families import Family, Geometry, Projections
from attnzoo.hf.attention import layer_of, masked_attention, refuse_unsupported
from attnzoo.hf.weights import (
    WEIGHTS,
    check_implementation,
    dropout_of,
    own_cache,
    own_projections,
    scale_of,
    softcap_of,
    take_over,
    undone,
)
from attnzoo.layers import GroupedQueryAttention
from attnzoo.layers.rope import apply_rotary
from attnzoo.masks import Mask


class SwappedAttention(GroupedQueryAttention):
    """Grouped-query attention with a transformers layer's forward: RoPE, cache and masks are the model's.

    Under `state_dict` it has the family's own tensor names wherever the family holds this number of KV heads, and reads
    them in `load_state_dict`.

    Args:
        old: the layer that it takes the place of; norms, dropouts and numbers are read from it.
        projections: its weights; tensors that are those of `old` are shared, not copied.
        trained: as `projections`, but bool: whether the weights require gradients.
        family, geometry: how the family stores them.
        mask: which query sees which key.
        narrower: whether `mask` hides keys that the model's own mask shows.
        stock: whether the stock family can hold these weights.
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
        *,
        mask: Mask,
        narrower: bool,
        stock: bool,
    ) -> None:
        with torch.device("meta"):  # the weights come from `projections`
            super().__init__(
                geometry.dim,
                geometry.num_heads,
                geometry.num_kv_heads,
                head_dim=geometry.head_dim,
                mask=mask,
                dropout=dropout_of(old),
                scale=scale_of(old),
                softcap=softcap_of(old, family),
            )
        self.family, self.geometry, self.narrower, self.stock = family, geometry, narrower, stock
        take_over(self, old, projections, trained, outputs=getattr(family, "outputs", True))
        if set(self.stock_names()) != set(self.own_names()):
            self.register_state_dict_post_hook(_to_stock)
            self.register_load_state_dict_pre_hook(_from_stock)

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
        """What the model's block calls.

        Args:
            hidden_states: `[B, S, dim]`.
            position_embeddings: cos and sin `[B, S, rotary_dim]` from the model's rotary module, or None.
            attention_mask: what `attnzoo_mask` made.
            past_key_values, layer_past: the model's cache, under either name; keys and values are appended.
            cu_seq_lens_q, cu_seq_lens_k: int32 `[N + 1]`, boundaries of packed documents.

        Returns:
            (`[B, S, dim]`, None).

        Raises:
            ValueError: if the model was set to another attn_implementation, whose masks mean something else.
        """
        check_implementation(self)
        refuse_unsupported(self, kwargs)
        q = self.project_q(hidden_states)
        k, v = self.project_kv(hidden_states)
        if position_embeddings is not None:
            cos, sin = (table[..., : table.shape[-1] // 2] for table in position_embeddings)  # both halves are equal
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        cache = own_cache(past_key_values, layer_past)
        first_query, first_key = offsets(cache, self.layer_idx, q.shape[2])
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        assert self.mask is not None
        if self.narrower and layer_of(k) is None:
            attention_mask = narrowed(attention_mask, self.mask, first_query, first_key, q.shape[2], k.shape[2])
        out = masked_attention(
            q,
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
        out = self.merge(out)
        return (out if self.resid_dropout is None else self.resid_dropout(out)), None

    def projections(self) -> tuple[Projections, Projections]:
        """The weights, as views, and which of them require gradients, as bool."""
        return own_projections(self, self.geometry)

    def own_names(self) -> list[str]:
        """Names of the weights inside this module."""
        return [name for name, _ in self.named_parameters()]

    def stock_names(self) -> list[str]:
        """Names of the weights inside the stock family's module; this module's own if that cannot hold them."""
        if not self.stock:
            return self.own_names()
        shapes = {name: parameter.to("meta") for name, parameter in self.named_parameters()}
        return list(self.family.join(undone(shapes, self.geometry), self.geometry))


def narrowed(
    mask: Tensor | None, pattern: Mask, first_query: int | Tensor, first_key: int, queries: int, keys: int
) -> Tensor | None:
    """A bool mask of the model's without the keys that `pattern` hides; in its other forms it leaves that to others.

    The pattern's positions count the real tokens of a row, whose padding on the left the last query does not see.
    """
    if mask is None or mask.dtype != torch.bool:
        return mask
    mask = mask[..., :keys]
    padded = mask[:, :1, -1:].to(torch.int8).argmax(-1, keepdim=True)  # [B, 1, 1, 1]
    i = torch.arange(queries, device=mask.device)[:, None] + first_query - padded
    j = torch.arange(keys, device=mask.device) + first_key - padded
    return mask & pattern.visible(i.clamp(min=0), j.clamp(min=0))  # before 0 there is padding only


def offsets(cache: Cache | None, layer: int, new: int) -> tuple[int | Tensor, int]:
    """Absolute positions of the first query and the first key, as they are before the cache takes the new tokens."""
    if cache is None:
        return 0, 0
    seen = cache.get_seq_length(layer)
    seen = seen.clone() if isinstance(seen, Tensor) else seen  # a static cache counts in place
    return seen, cache.get_mask_sizes(new, layer)[1]


def _to_stock(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    assert isinstance(module, SwappedAttention)
    if module.stock:
        own = {name: state.pop(prefix + name) for name in module.own_names() if prefix + name in state}
        stock = module.family.join(undone(own, module.geometry), module.geometry)
        state.update({prefix + name: tensor for name, tensor in stock.items()})


def _from_stock(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    assert isinstance(module, SwappedAttention)
    names = module.stock_names()
    if all(prefix + name in state for name in names):
        parts = module.family.split({name: state.pop(prefix + name) for name in names}, module.geometry)
        own = module.own_names()
        for layer, part in WEIGHTS.items():
            linear = getattr(module, layer)
            for name, tensor in (("weight", getattr(parts, part)), ("bias", getattr(parts, f"{part}_bias"))):
                if f"{layer}.{name}" in own and tensor is not None:
                    state[f"{prefix}{layer}.{name}"] = tensor.reshape(getattr(linear, name).shape)
