"""T5 whose decoder's query heads share keys and values in groups (arXiv 2305.13245), in self- and cross-attention.

This file is all that loading it needs: `from_pretrained(folder, trust_remote_code=True)`.
"""

# mypy: ignore-errors
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.cache_utils import EncoderDecoderCache
from transformers.models.t5.modeling_t5 import T5Attention


class T5GQAConfig(T5Config):
    """T5's config with `num_key_value_heads` of the decoder, a divisor of `num_heads`."""

    model_type = "t5_gqa"
    num_key_value_heads: int | None = None


class T5GQAAttention(T5Attention):
    """T5's layer with narrower k and v; relative positions are each query head's own."""

    def __init__(self, old):
        super().__init__(old.config, old.has_relative_attention_bias, old.layer_idx)
        size = old.config.num_key_value_heads * self.key_value_proj_dim
        self.k = nn.Linear(self.d_model, size, bias=False)
        self.v = nn.Linear(self.d_model, size, bias=False)

    def forward(
        self, hidden_states, mask=None, key_value_states=None, position_bias=None, past_key_values=None, **kwargs
    ):
        q = self.heads(self.q(hidden_states))
        k, v, seen = self.keys_and_values(hidden_states, key_value_states, past_key_values)
        if position_bias is None:
            shape = (q.shape[2], k.shape[2])
            position_bias = q.new_zeros((1, self.n_heads, *shape))
            if self.has_relative_attention_bias:
                position_bias = self.compute_bias(*shape, device=q.device, past_seen_tokens=seen)
        groups = q.unflatten(1, (k.shape[1], -1))  # [B, Hk, g, S, D]; the scores are not scaled
        scores = (groups @ k.unsqueeze(2).mT).flatten(1, 2) + position_bias
        if mask is not None:
            scores = (
                scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
            )
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        weights = nn.functional.dropout(weights, self.dropout, self.training)
        out = (weights.unflatten(1, (k.shape[1], -1)) @ v.unsqueeze(2)).flatten(1, 2)
        return self.o(out.transpose(1, 2).flatten(2)), position_bias, weights

    def heads(self, x):
        """[B, S, H * D] -> [B, H, S, D]"""
        return x.unflatten(-1, (-1, self.key_value_proj_dim)).transpose(1, 2)

    def keys_and_values(self, hidden_states, source, cache):
        """Of all that the layer sees, and how many tokens it had seen; those of the source are made once."""
        seen = cache.get_seq_length(self.layer_idx) if cache is not None else 0
        seen = seen.clone() if isinstance(seen, torch.Tensor) else seen
        both = isinstance(cache, EncoderDecoderCache)
        if both and source is not None and cache.is_updated.get(self.layer_idx):
            made = cache.cross_attention_cache.layers[self.layer_idx]
            return made.keys, made.values, seen
        states = hidden_states if source is None else source
        k, v = self.heads(self.k(states)), self.heads(self.v(states))
        if cache is not None:
            own = (cache.self_attention_cache if source is None else cache.cross_attention_cache) if both else cache
            k, v = own.update(k, v, self.layer_idx)
            if both and source is not None:
                cache.is_updated[self.layer_idx] = True
        return k, v, seen


class T5GQAForConditionalGeneration(T5ForConditionalGeneration):
    """T5's model with these layers in its decoder."""

    config_class = T5GQAConfig

    def __init__(self, config):
        config._attn_implementation = "eager"  # whose masks are written out
        super().__init__(config)
        for block in self.decoder.block:
            for number, name in enumerate(("SelfAttention", "EncDecAttention")):
                setattr(block.layer[number], name, T5GQAAttention(getattr(block.layer[number], name)))
