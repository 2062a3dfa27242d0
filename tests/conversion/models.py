"""Tiny random models of every family, as stock transformers builds them."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Odd on purpose: 6 query heads, head_dim 10 where the config may say so (6 * 10 is not the hidden size of 48).
USUAL = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS = {
    "llama": USUAL | {"num_key_value_heads": 6, "head_dim": 10, "attention_bias": True},
    "mistral": USUAL | {"num_key_value_heads": 6, "head_dim": 10, "sliding_window": 5},
    "qwen2": USUAL | {"num_key_value_heads": 6, "tie_word_embeddings": True},
    "qwen3": USUAL | {"num_key_value_heads": 6, "head_dim": 10},
    "gemma": USUAL | {"num_key_value_heads": 6, "head_dim": 10},
    "gemma2": USUAL | {"num_key_value_heads": 6, "head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 10},
    "gemma3_text": USUAL | {"num_key_value_heads": 6, "head_dim": 10, "sliding_window": 5, "sliding_window_pattern": 2},
    "phi3": USUAL | {"num_key_value_heads": 6},
    "phi": USUAL | {"num_key_value_heads": 6},
    "gpt2": {"vocab_size": 67, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64},
    "gpt_bigcode": {"vocab_size": 67, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64, "multi_query": False},
    "gpt_neox": USUAL | {"rotary_pct": 0.25},
}


def tiny(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A random model whose every parameter is random, biases and norms too, so that none can be lost unseen."""
    config = CONFIG_MAPPING[model_type](**(CONFIGS[model_type] | TOKENS | changes))
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(noise * scale + (parameter if "norm" in name or "ln_" in name else 0))
    return model.to(dtype).eval()


def tokens(seed: int = 1, length: int = 17) -> torch.Tensor:
    return torch.randint(3, 67, (2, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(tokens()).logits
