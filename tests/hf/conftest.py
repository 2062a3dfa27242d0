"""Tiny random models of every family, built once a session; tests copy what they change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import attnzoo.hf  # noqa: F401  (registers the attention function)

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GEMMA: dict[str, Any] = COMMON | {"head_dim": 16}
ALTERNATE = ["sliding_attention", "full_attention"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": COMMON | {"attention_bias": True},
    "mistral": COMMON | {"sliding_window": 5},
    "ministral": COMMON | {"head_dim": 8, "sliding_window": 5, "layer_types": ALTERNATE},
    "qwen2": COMMON | {"use_sliding_window": True, "sliding_window": 5, "layer_types": ALTERNATE},
    "qwen3": COMMON | {"head_dim": 16, "num_key_value_heads": 2},
    "gemma": GEMMA,
    "gemma2": GEMMA
    | {"sliding_window": 5, "layer_types": ALTERNATE, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "gemma3_text": GEMMA | {"sliding_window": 5, "layer_types": ALTERNATE, "query_pre_attn_scalar": 16},
    "phi": COMMON | {"partial_rotary_factor": 0.5},
    "phi3": COMMON | {"sliding_window": 5, "partial_rotary_factor": 0.5},
    "gpt2": {
        "vocab_size": 97,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    },
    "gpt_neox": COMMON | {"rotary_pct": 0.5},
    "granite": COMMON | {"attention_multiplier": 0.3, "attention_bias": True},
    "mixtral": COMMON | {"sliding_window": 5, "num_local_experts": 2},
    "nemotron": COMMON | {"partial_rotary_factor": 0.5},
    "qwen2_moe": COMMON | EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": COMMON | EXPERTS | {"head_dim": 16, "num_key_value_heads": 2},
    "stablelm": COMMON | {"use_qkv_bias": True},
    "starcoder2": COMMON | {"sliding_window": 5},
    "gpt_oss": COMMON
    | {"head_dim": 8, "sliding_window": 5, "layer_types": ALTERNATE, "num_local_experts": 2, "num_experts_per_tok": 1},
}


@pytest.fixture(scope="session")
def build() -> Callable[..., PreTrainedModel]:
    """build(model_type, dtype=..., implementation=..., **config) -> a fresh copy of the family's tiny model."""
    made: dict[Any, PreTrainedModel] = {}

    def make(
        model_type: str, *, dtype: torch.dtype = torch.float32, implementation: str = "eager", **changes: Any
    ) -> PreTrainedModel:
        key = (model_type, dtype, tuple(sorted((k, str(v)) for k, v in changes.items())))
        if key not in made:
            torch.manual_seed(0)
            config = AutoConfig.for_model(model_type, **(FAMILIES[model_type] | changes))
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()
            if config.model_type in ("mixtral", "qwen2_moe", "qwen3_moe"):
                model.set_experts_implementation("eager")  # the default multiplies no fp64
            with torch.no_grad():  # away from the initialisation's zeros and ones, so that every parameter matters
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            made[key] = model
        model = copy.deepcopy(made[key])
        model.set_attn_implementation(implementation)
        return model

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    """int64 [3, 12], no padding among them."""
    return torch.randint(2, 97, (3, 12), generator=torch.Generator().manual_seed(1))


def padding(lengths: tuple[int, ...], total: int, side: str) -> torch.Tensor:
    """int64 [B, total]: 1 at real tokens, 0 at padding on the given side."""
    position = torch.arange(total)[None, :]
    length = torch.tensor(lengths)[:, None]
    return (position < length if side == "right" else position >= total - length).long()
