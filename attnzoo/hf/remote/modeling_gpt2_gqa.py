"""GPT-2 whose query heads share keys and values in groups (arXiv 2305.13245).

This file is all that loading it needs: `from_pretrained(folder, trust_remote_code=True)`.
"""

# mypy: ignore-errors
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.pytorch_utils import Conv1D


class GPT2GQAConfig(GPT2Config):
    """GPT-2's config with `num_key_value_heads`, a divisor of `n_head`."""

    model_type = "gpt2_gqa"
    num_key_value_heads: int | None = None


class GPT2GQAAttention(GPT2Attention):
    """GPT-2's layer; the columns of c_attn are all queries', then fewer heads' keys, then as many values."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx=layer_idx)
        heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // heads
        self.sizes = (self.embed_dim, heads * self.head_dim, heads * self.head_dim)
        self.c_attn = Conv1D(sum(self.sizes), self.embed_dim)

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, **kwargs):
        q, k, v = (
            x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, S, D]
            for x in self.c_attn(hidden_states).split(self.sizes, dim=-1)
        )
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        dropout = self.attn_dropout.p if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.resid_dropout(self.c_proj(out.flatten(2))), weights


def eager(module, q, k, v, attention_mask, scaling, dropout=0.0, **kwargs):
    """The attention weights written out; the model's mask is added to the scores."""
    k, v = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (k, v))
    scores = q @ k.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ v).transpose(1, 2).contiguous(), weights


class GPT2GQALMHeadModel(GPT2LMHeadModel):
    """GPT-2's language model with these layers."""

    config_class = GPT2GQAConfig

    def __init__(self, config):
        super().__init__(config)
        for number, block in enumerate(self.transformer.h):
            block.attn = GPT2GQAAttention(config, number)
