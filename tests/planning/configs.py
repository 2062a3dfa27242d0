"""The config.json of public models, as far as a plan reads them, and their published sizes."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def llama(dim: int, hidden: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> Config:
    return {
        "model_type": "llama",
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        **more,
    }


LLAMA_8B = llama(4096, 14336, 32, 32, 8, 128256, max_position_embeddings=131072)
LLAMA_405B = llama(16384, 53248, 126, 128, 8, 128256, max_position_embeddings=131072)
SMOLLM2 = llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True, max_position_embeddings=8192)
MISTRAL_V1 = llama(4096, 14336, 32, 32, 8, 32000, model_type="mistral", sliding_window=4096)
MIXTRAL = llama(
    4096,
    14336,
    32,
    32,
    8,
    32000,
    model_type="mixtral",
    num_local_experts=8,
    num_experts_per_tok=2,
    sliding_window=None,
)
QWEN3_8B = llama(
    4096,
    12288,
    36,
    32,
    8,
    151936,
    model_type="qwen3",
    head_dim=128,
    max_window_layers=36,
    sliding_window=None,
    use_sliding_window=False,
)
QWEN3_30B_A3B = llama(
    2048,
    6144,
    48,
    32,
    4,
    151936,
    model_type="qwen3_moe",
    head_dim=128,
    moe_intermediate_size=768,
    num_experts=128,
    num_experts_per_tok=8,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    use_sliding_window=False,
)
GEMMA2_9B = {
    "model_type": "gemma2",
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "vocab_size": 256000,
    "sliding_window": 4096,
    "attention_bias": False,
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "n_ctx": 1024,
    "vocab_size": 50257,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "vocab_size": 129280,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_group": 8,
    "topk_group": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 163840,
}
# Images left out, and most keys too: the class has the defaults.
GEMMA3_4B = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}

# (config, published parameters in billions)
PUBLISHED: dict[str, tuple[Config, float]] = {
    "Llama-3.1-8B": (LLAMA_8B, 8.03),
    "Llama-3.1-70B": (llama(8192, 28672, 80, 64, 8, 128256), 70.6),
    "Llama-3.1-405B": (LLAMA_405B, 405.9),
    "SmolLM2-135M": (SMOLLM2, 0.1345),
    "Mistral-7B": (MISTRAL_V1, 7.24),
    "Mixtral-8x7B": (MIXTRAL, 46.7),
    "Qwen3-8B": (QWEN3_8B, 8.19),
    "Qwen3-30B-A3B": (QWEN3_30B_A3B, 30.5),
    "Gemma-2-9B": (GEMMA2_9B, 9.24),
    "GPT-2": (GPT2, 0.1244),
    "DeepSeek-V3": (DEEPSEEK_V3, 671.0),
}
