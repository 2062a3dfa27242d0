"""BLOOM whose query heads share keys and values in groups (arXiv 2305.13245); ALiBi is each query head's own.

This file is all that loading it needs: `from_pretrained(folder, trust_remote_code=True)`.
"""

# mypy: ignore-errors
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM
from transformers.models.bloom.modeling_bloom import BloomAttention


class BloomGQAConfig(BloomConfig):
    """BLOOM's config with `num_key_value_heads`, a divisor of `n_head`."""

    model_type = "bloom_gqa"
    num_key_value_heads: int | None = None


class BloomGQAAttention(BloomAttention):
    """BLOOM's layer; query_key_value has, for each KV head, the rows of its queries, of its key and of its value."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.kv_heads = config.num_key_value_heads
        self.query_key_value = nn.Linear(self.hidden_size, self.hidden_size + 2 * self.kv_heads * self.head_dim)

    def forward(self, hidden_states, residual, alibi, attention_mask, layer_past=None, **kwargs):
        batch, queries, _ = hidden_states.shape
        fused = self.query_key_value(hidden_states)
        groups = fused.view(batch, queries, self.kv_heads, -1, self.head_dim).transpose(1, 2)  # [B, Hk, S, g + 2, D]
        q, k, v = groups[:, :, :, :-2].transpose(2, 3), groups[:, :, :, -2], groups[:, :, :, -1]
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        scores = q @ k.unsqueeze(2).mT * self.inv_norm_factor  # [B, Hk, g, S, keys]
        scores = scores.flatten(1, 2) + alibi.view(batch, self.num_heads, 1, -1)
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        out = self.attention_dropout(weights).unflatten(1, (self.kv_heads, -1)) @ v.unsqueeze(2)
        out = self.dense(out.flatten(1, 2).transpose(1, 2).flatten(2))
        return residual + nn.functional.dropout(out, self.hidden_dropout, self.training), weights


class BloomGQAForCausalLM(BloomForCausalLM):
    """BLOOM's language model with these layers."""

    config_class = BloomGQAConfig

    def __init__(self, config):
        super().__init__(config)
        for number, block in enumerate(self.transformer.h):
            block.self_attention = BloomGQAAttention(config, number)
