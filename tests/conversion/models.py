"""Tiny random models of every family, as stock transformers builds them."""

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from attnzoo.conversion import merge_heads
from attnzoo.conversion.families import family_for

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
GROUPED = USUAL | {"num_key_value_heads": 6}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CONFIGS = {
    "llama": USUAL | {"num_key_value_heads": 6, "head_dim": 10, "attention_bias": True},
    "mistral": USUAL | {"num_key_value_heads": 6, "head_dim": 10, "sliding_window": 5},
    "ministral": USUAL
    | {
        "num_key_value_heads": 6,
        "head_dim": 10,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen2": USUAL | {"num_key_value_heads": 6, "tie_word_embeddings": True},
    "qwen3": USUAL | {"num_key_value_heads": 6, "head_dim": 10},
    "gemma": USUAL | {"num_key_value_heads": 6, "head_dim": 10},
    "gemma2": USUAL | {"num_key_value_heads": 6, "head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 10},
    "gemma3_text": USUAL | {"num_key_value_heads": 6, "head_dim": 10, "sliding_window": 5, "sliding_window_pattern": 2},
    "phi3": USUAL | {"num_key_value_heads": 6},
    "phi": USUAL | {"num_key_value_heads": 6},
    "mixtral": GROUPED | {"head_dim": 10, "num_local_experts": 2, "sliding_window": 5},
    "qwen2_moe": GROUPED | EXPERTS | {"shared_expert_intermediate_size": 24, "mlp_only_layers": [0]},
    "qwen3_moe": GROUPED | EXPERTS | {"head_dim": 10, "decoder_sparse_step": 2},
    "granite": GROUPED | {"attention_bias": True, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    "stablelm": GROUPED | {"use_qkv_bias": True, "use_parallel_residual": True},
    "starcoder2": GROUPED | {"sliding_window": 5},
    "nemotron": GROUPED | {"head_dim": 10, "attention_bias": True},
    "smollm3": GROUPED | {"no_rope_layer_interval": 2},
    "olmo": GROUPED | {"clip_qkv": 0.5},
    "olmo2": GROUPED | {"attention_bias": True},
    "olmo3": GROUPED | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere": GROUPED | {"use_qk_norm": True, "attention_bias": True},
    "cohere2": GROUPED | {"head_dim": 10, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"vocab_size": 67, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64},
    "gpt_bigcode": {"vocab_size": 67, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64, "multi_query": False},
    "gpt_neox": USUAL | {"rotary_pct": 0.25},
    "falcon": USUAL | {"new_decoder_architecture": True, "num_kv_heads": 6, "bias": True},
    "opt": USUAL | {"ffn_dim": 56, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 67, "hidden_size": 48, "n_layer": 2, "n_head": 6},
    "t5": {
        "vocab_size": 67,
        "d_model": 48,
        "d_kv": 10,
        "d_ff": 56,
        "num_layers": 3,  # fewer than the decoder's break the stock model's generate
        "num_decoder_layers": 2,
        "num_heads": 6,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
        "decoder_start_token_id": 0,
    },
    "gptj": {"vocab_size": 67, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64, "rotary_dim": 6},
}

# Whose own class has as many KV heads as query heads, or one.
HELD_ELSEWHERE = ("bloom", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "opt", "t5")


def tiny(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A random model whose every parameter is random, biases and norms too, so that none can be lost unseen."""
    config = CONFIG_MAPPING[model_type](**(CONFIGS[model_type] | TOKENS | changes))
    model = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(noise * scale + (parameter if "norm" in name or "ln_" in name else 0))
    return model.to(dtype).eval()


def duplicate(model: PreTrainedModel, heads: int) -> PreTrainedModel:
    """The model with its KV heads equal in contiguous groups, so that `heads` of them are all that it has."""
    family = family_for(model.config.model_type)
    geometry = family.geometry(model.config.to_dict())
    for number in range(family.attentions(geometry)):
        attention = model.get_submodule(family.attention_path(number))
        state = attention.state_dict()
        few = merge_heads(family.split(state, geometry), heads, "first")
        for name in ("k", "v", "k_bias", "v_bias", "k_norm"):
            if (tensor := getattr(few, name)) is not None and (name != "k_norm" or tensor.ndim == 2):
                object.__setattr__(few, name, tensor.repeat_interleave(geometry.num_kv_heads // heads, dim=0))
        attention.load_state_dict(state | family.join(few, geometry))
    return model


def tokens(seed: int = 1, length: int = 17) -> torch.Tensor:
    return torch.randint(3, 67, (2, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    decoded = {"decoder_input_ids": tokens(seed=2, length=11)} if model.config.is_encoder_decoder else {}
    return model(tokens(), **decoded).logits


@torch.no_grad()
def generated(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """Five more tokens of each row, greedily."""
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(**({"input_ids": tokens()} | inputs), **options)
