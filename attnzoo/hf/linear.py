"""The linear attention layer that `attnzoo.swap` puts into a transformers model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from attnzoo.conversion.families import Family, Geometry, Projections
from attnzoo.hf.attention import refuse_unsupported
from attnzoo.hf.recurrent_cache import RecurrentLayer, recurrent_layer
from attnzoo.hf.rows import Rows, read_rows
from attnzoo.hf.weights import check_implementation, own_cache, own_projections, scale_of, take_over
from attnzoo.layers import LinearAttention
from attnzoo.layers.inputs import zero_padding
from attnzoo.layers.rope import apply_rotary
from attnzoo.specs import Linear


class SwappedLinearAttention(LinearAttention):
    """Linear attention with a transformers layer's forward; its state lies in the model's own cache.

    Projections, norms, biases and the rotation are the old layer's, the feature map is new. A softcap and attention
    dropout have no meaning here and are dropped. Padding is whatever the model's mask says, on either side.

    Args:
        old: the layer that it takes the place of.
        projections: its weights; tensors that are those of `old` are shared, not copied.
        trained: as `projections`, but bool: whether the weights require gradients.
        family, geometry: where they come from, with the number of KV heads that `projections` has.
        spec: what to build.
    """

    keeps_state = True  # in the model's cache
    layer_idx: int
    resid_dropout: nn.Module | None

    def __init__(
        self,
        old: nn.Module,
        projections: Projections,
        trained: Projections,
        family: Family,
        geometry: Geometry,
        spec: Linear,
    ) -> None:
        like = projections.k
        learned = spec.feature_map in ("favor", "hedgehog") or spec.window is not None
        with torch.device("cpu" if learned else "meta"):  # the weights come from `projections`
            super().__init__(
                geometry.dim,
                geometry.num_heads,
                num_kv_heads=geometry.num_kv_heads,
                head_dim=geometry.head_dim,
                feature_map=spec.feature_map,
                num_features=spec.num_features,
                normalize=spec.normalize,
                decay=spec.decay,
                causal=bool(getattr(old, "is_causal", True)),
                window=spec.window,
                scale=scale_of(old),
            )
        self.geometry, self.spec = geometry, spec
        take_over(self, old, projections, trained, outputs=getattr(family, "outputs", True))
        # Directions of random features stay in fp32.
        dtype = like.dtype if spec.feature_map == "hedgehog" or like.dtype == torch.float64 else None
        if self.learned_map is not None:
            self.learned_map.to(like.device, dtype)
        if self.window is not None:
            self.window_factors = nn.Parameter(self.window_factors.detach().to(like))
        # Not a buffer: from_pretrained would put an unset tensor in the place of one that is not saved.
        del self.log_decay
        self.log_decay = None
        self._set_decay(torch.promote_types(like.dtype, torch.float32), like.device)

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
        """What the model's block calls; the arguments are those of `SwappedAttention`.

        Raises:
            ValueError: for another attn_implementation, a mask that hides more than padding, a cache with other things.
        """
        check_implementation(self)
        if self.log_decay is not None and self.log_decay.device != hidden_states.device:
            self._set_decay(self.log_decay.dtype, hidden_states.device)
        refuse_unsupported(self, kwargs)
        cache = own_cache(past_key_values, layer_past)
        held = None if cache is None or not self.causal else recurrent_layer(cache, self.layer_idx)
        seen = 0 if held is None else held.seen
        shape = hidden_states.shape[0], hidden_states.shape[1]
        if held is not None and held.new_lengths is not None and attention_mask is None:
            rows = Rows(shape, lengths=held.new_lengths)
        else:
            rows = read_rows(attention_mask, shape, seen, causal=self.causal, cu_seqlens=cu_seq_lens_q)
        x = zero_padding(rows.lay(hidden_states), rows.lengths, rows.cu_seqlens)
        q = self.project_q(x)
        k, v = self.project_kv(x)
        tables = rows.lay_tables(position_embeddings)
        if tables is not None:
            q, k = apply_rotary(q, *tables), apply_rotary(k, *tables)
        out = rows.restore(self.merge(self._attend(q, k, v, rows, held)))
        return (out if self.resid_dropout is None else self.resid_dropout(out)), None

    def projections(self) -> tuple[Projections, Projections]:
        """The weights, as views, and which of them require gradients, as bool."""
        return own_projections(self, self.geometry)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, held: RecurrentLayer | None) -> Tensor:
        f_q, f_k = self.features(q, query=True), self.features(k, query=False)
        if held is None or rows.cu_seqlens is not None:
            if held is not None:
                if held.seen:
                    raise ValueError("packed documents came with a cache that holds tokens; give none, or a new one")
                held.close()
            return self.attend(q, k, v, f_q, f_k, rows.lengths, rows.cu_seqlens)
        held.check_open()
        near_keys = k if self.window is not None else None
        if held.state is None:
            held.state = self.new_cache(q.shape[0], dtype=v.dtype, device=v.device)
            held.record(f_k, v, rows.lengths, near_keys)
            held.append(f_k, v, rows.lengths, near_keys, done=False)
            return self.attend(
                q, k, v, f_q, f_k, rows.lengths, rows.cu_seqlens
            )  # with gradients, which a cache does not pass on
        held.record(f_k, v, rows.lengths, near_keys)
        state = self._checked(held.state, q.shape[0], False)
        if held.before is not None:
            return self.decode(q, k, v, f_q, f_k, state, before=held.before)
        out = self.decode(q, k, v, f_q, f_k, state, rows.lengths)
        held.append(f_k, v, rows.lengths, near_keys, done=True)
        return out
