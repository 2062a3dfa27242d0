"""OPT whose query heads share keys and values in groups (arXiv 2305.13245).

This file is all that loading it needs: `from_pretrained(folder, trust_remote_code=True)`.
"""

# mypy: ignore-errors
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.opt.modeling_opt import OPTAttention


class OPTGQAConfig(OPTConfig):
    """OPT's config with `num_key_value_heads`, a divisor of `num_attention_heads`."""

    model_type = "opt_gqa"
    num_key_value_heads: int | None = None


class OPTGQAAttention(OPTAttention):
    """OPT's layer with narrower k_proj and v_proj; the cache holds `num_key_value_heads` heads."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // heads
        self.k_proj = nn.Linear(self.embed_dim, heads * self.head_dim, bias=self.enable_bias)
        self.v_proj = nn.Linear(self.embed_dim, heads * self.head_dim, bias=self.enable_bias)

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, **kwargs):
        q = self.q_proj(hidden_states) * self.scaling
        q, k, v = (
            x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, S, D]
            for x in (q, self.k_proj(hidden_states), self.v_proj(hidden_states))
        )
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        dropout = self.dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=1.0, **kwargs)
        return self.out_proj(out.flatten(2)), weights


def eager(module, q, k, v, attention_mask, scaling, dropout=0.0, **kwargs):
    """The attention weights written out; the model's mask is added to the scores."""
    k, v = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (k, v))
    scores = q @ k.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ v).transpose(1, 2).contiguous(), weights


class OPTGQAForCausalLM(OPTForCausalLM):
    """OPT's language model with these layers."""

    config_class = OPTGQAConfig

    def __init__(self, config):
        super().__init__(config)
        for number, layer in enumerate(self.model.decoder.layers):
            layer.self_attn = OPTGQAAttention(config, number)
