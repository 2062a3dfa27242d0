"""The attention layer that `attnzoo.swap` puts into a transformers model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, EncoderDecoderCache

from attnzoo.conversion.families import Family, Geometry, Projections
from attnzoo.hf.attention import masked_attention, refuse_unsupported
from attnzoo.layers import GroupedQueryAttention
from attnzoo.layers.rope import apply_rotary
from attnzoo.masks import Mask

_WEIGHTS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}


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
                dropout=_dropout(old),
                scale=_scale(old),
                softcap=_softcap(old, family),
            )
        self.family, self.geometry, self.narrower, self.stock = family, geometry, narrower, stock
        self.config: PreTrainedConfig = old.config  # type: ignore[assignment]
        self.layer_idx: int = old.layer_idx  # type: ignore[assignment]
        self.is_causal = bool(getattr(old, "is_causal", True))
        self.q_norm, self.k_norm = getattr(old, "q_norm", None), getattr(old, "k_norm", None)
        self.resid_dropout = getattr(old, "resid_dropout", None)
        for layer, part in _WEIGHTS.items():
            linear = getattr(self, layer)
            for name, source in (("weight", part), ("bias", f"{part}_bias")):
                tensor = getattr(projections, source)
                if tensor is not None:
                    flat = tensor.reshape(linear.weight.shape) if name == "weight" else tensor.flatten()
                    setattr(linear, name, _parameter(old, layer, name, flat, getattr(trained, source)))
        self.train(old.training)
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
        if self.config._attn_implementation != "attnzoo":
            raise ValueError(
                'a swapped model needs attn_implementation="attnzoo", which swap sets; '
                f"got {self.config._attn_implementation!r}"
            )
        refuse_unsupported(self, kwargs)
        q = self.project_q(hidden_states)
        k, v = self.project_kv(hidden_states)
        if position_embeddings is not None:
            cos, sin = (table[..., : table.shape[-1] // 2] for table in position_embeddings)  # both halves are equal
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        cache = past_key_values if past_key_values is not None else layer_past
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        first_query, first_key = _offsets(cache, self.layer_idx, q.shape[2])
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        assert self.mask is not None
        if self.narrower and attention_mask is not None and attention_mask.dtype == torch.bool:
            i = torch.arange(q.shape[2], device=q.device) + first_query
            j = torch.arange(k.shape[2], device=q.device) + first_key
            attention_mask = attention_mask[..., : k.shape[2]] & self.mask.visible(i[:, None], j[None, :])
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

    def projections(self) -> Projections:
        """The weights, as views."""
        weights = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return self._undone(weights)

    def trained(self) -> Projections:
        """Which weights require gradients, in the form of `projections`."""
        return self._undone({name: flag_of(parameter) for name, parameter in self.named_parameters()})

    def own_names(self) -> list[str]:
        """Names of the weights inside this module."""
        return [name for name, _ in self.named_parameters()]

    def stock_names(self) -> list[str]:
        """Names of the weights inside the stock family's module; this module's own if that cannot hold them."""
        if not self.stock:
            return self.own_names()
        shapes = {name: parameter.to("meta") for name, parameter in self.named_parameters()}
        return list(self.family.join(self._undone(shapes), self.geometry))

    def _undone(self, weights: Mapping[str, Tensor]) -> Projections:
        g = self.geometry
        heads = {"q": g.num_heads, "k": g.num_kv_heads, "v": g.num_kv_heads}
        parts: dict[str, Tensor | None] = {}
        for layer, part in _WEIGHTS.items():
            weight, bias = weights[f"{layer}.weight"], weights.get(f"{layer}.bias")
            if part == "o":
                parts |= {"o": weight.view(g.dim, g.num_heads, g.head_dim), "o_bias": bias}
            else:
                parts[part] = weight.view(heads[part], g.head_dim, g.dim)
                parts[f"{part}_bias"] = None if bias is None else bias.view(heads[part], g.head_dim)
        norms = {name: weights.get(f"{name}.weight") for name in ("q_norm", "k_norm")}
        return Projections(**parts, **norms)  # type: ignore[arg-type]


def flag_of(parameter: nn.Parameter) -> Tensor:
    """A bool tensor of the parameter's shape, and of no memory, that says whether it requires gradients."""
    return torch.tensor(parameter.requires_grad).expand(parameter.shape)


def _parameter(old: nn.Module, layer: str, name: str, tensor: Tensor, trained: Tensor) -> nn.Parameter:
    """The old layer's parameter itself where the tensor is its storage, so that optimizers and ties stay valid."""
    there = getattr(getattr(old, layer, None), name, None)
    if isinstance(there, nn.Parameter) and there.shape == tensor.shape and there.data_ptr() == tensor.data_ptr():
        return there
    if tensor.untyped_storage().nbytes() > tensor.nbytes:  # a part of a fused weight, which can go then
        tensor = tensor.clone()
    return nn.Parameter(tensor.contiguous(), requires_grad=bool(trained[(0,) * trained.ndim]))


def _dropout(old: nn.Module) -> float:
    if isinstance(old, SwappedAttention):
        return old.dropout
    module = getattr(old, "attn_dropout", None)  # GPT-2
    return float(module.p if isinstance(module, nn.Dropout) else getattr(old, "attention_dropout", 0.0))


def _scale(old: nn.Module) -> float:
    scale = old.scale if isinstance(old, SwappedAttention) else old.scaling
    return float(scale)  # type: ignore[arg-type]


def _softcap(old: nn.Module, family: Family) -> float | None:
    if isinstance(old, SwappedAttention):
        return old.softcap
    # Gemma3's layers have the attribute as well, and do not use it.
    return getattr(old, "attn_logit_softcapping", None) if family.model_type == "gemma2" else None


def _offsets(cache: Cache | None, layer: int, new: int) -> tuple[int | Tensor, int]:
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
        stock = module.family.join(module._undone(own), module.geometry)
        state.update({prefix + name: tensor for name, tensor in stock.items()})


def _from_stock(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    assert isinstance(module, SwappedAttention)
    names = module.stock_names()
    if all(prefix + name in state for name in names):
        parts = module.family.split({name: state.pop(prefix + name) for name in names}, module.geometry)
        own = module.own_names()
        for layer, part in _WEIGHTS.items():
            linear: nn.Linear = getattr(module, layer)
            for name, tensor in (("weight", getattr(parts, part)), ("bias", getattr(parts, f"{part}_bias"))):
                if f"{layer}.{name}" in own and tensor is not None:
                    state[f"{prefix}{layer}.{name}"] = tensor.reshape(getattr(linear, name).shape)
