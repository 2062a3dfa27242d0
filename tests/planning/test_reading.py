"""What is read from a config.json: parameters to the last one, windows, caches, and what is wrong with it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from attnzoo.masks import SlidingWindow
from attnzoo.planning import known_types, read_model
from attnzoo.planning.attention import Softmax
from tests.planning.configs import (
    DEEPSEEK_V3,
    GEMMA2_9B,
    GEMMA3_4B,
    GPT2,
    LLAMA_8B,
    LLAMA_405B,
    MISTRAL_V1,
    MIXTRAL,
    PUBLISHED,
    QWEN3_8B,
    QWEN3_30B_A3B,
    SMOLLM2,
)

# Types without a class in transformers, or that are a part of a larger one there (tested below).
ELSEWHERE = {"kimi_k2", "gemma3"} | {name for name in known_types() if "_vl" in name}


def parameters_on_meta(config) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_public_models_have_their_published_parameters_and_transformers_to_the_last_one(name):
    config, billions = PUBLISHED[name]
    total = read_model(config).weights.total
    assert total == pytest.approx(billions * 1e9, rel=0.01)
    values = {key: value for key, value in config.items() if key != "model_type"}
    assert total == parameters_on_meta(AutoConfig.for_model(config["model_type"], **values))


@pytest.mark.parametrize("model_type", [name for name in known_types() if name not in ELSEWHERE])
def test_every_known_type_has_the_parameters_of_its_class(model_type):
    config = AutoConfig.for_model(model_type)
    config.num_hidden_layers = 5  # so that dense layers, experts and both kinds of a pattern come
    for key in ("layer_types", "mlp_layer_types"):
        if getattr(config, key, None):
            setattr(config, key, getattr(config, key)[:5])
    if model_type == "deepseek_v2":
        config.num_experts_per_tok = 6
    if model_type == "ministral":
        config.head_dim, config.num_key_value_heads = 128, 8
    assert read_model(config.to_dict()).weights.total == parameters_on_meta(config)


def test_biases_and_other_switches_of_a_config_are_counted():
    for model_type in ("llama", "qwen3", "gemma", "deepseek_v3"):
        config = AutoConfig.for_model(model_type, num_hidden_layers=2, attention_bias=True)
        assert read_model(config.to_dict()).weights.total == parameters_on_meta(config)
    config = AutoConfig.for_model("llama", num_hidden_layers=2, mlp_bias=True, head_dim=96, tie_word_embeddings=True)
    assert read_model(config.to_dict()).weights.total == parameters_on_meta(config)
    config = AutoConfig.for_model("deepseek_v3", num_hidden_layers=2, q_lora_rank=None, n_shared_experts=2)
    assert read_model(config.to_dict()).weights.total == parameters_on_meta(config)


@pytest.mark.parametrize(
    ("config", "billions"), [(MIXTRAL, 12.9), (DEEPSEEK_V3, 37), (QWEN3_30B_A3B, 3.3)], ids=["mixtral", "v3", "qwen3"]
)
def test_active_parameters_leave_out_the_experts_that_a_token_is_not_sent_to(config, billions):
    weights = read_model(config).weights
    assert weights.active == pytest.approx(billions * 1e9, rel=0.02)  # what is published is rounded that far
    assert weights.active < weights.total and weights.matmul < weights.active


def test_kv_bytes_of_a_token_are_the_known_ones():
    def of_a_token(config):
        model = read_model(config)
        return model.cache_bytes(1001, 2) - model.cache_bytes(1000, 2)

    assert of_a_token(LLAMA_405B) == 2 * 126 * 8 * 128 * 2 == 516096
    assert of_a_token(DEEPSEEK_V3) == 61 * (512 + 64) * 2 == 70272
    assert of_a_token(SMOLLM2) == 23040
    assert of_a_token(GPT2) == 2 * 12 * 768 * 2


def windows(config) -> list[int | None]:
    masks = [layer.attention.mask for layer in read_model(config).layers]
    assert all(mask is None or isinstance(mask, SlidingWindow) for mask in masks)
    return [None if mask is None else mask.window for mask in masks]


def test_windows_are_read_as_each_class_means_them():
    assert windows(MISTRAL_V1) == [4096] * 32
    assert windows({**MISTRAL_V1, "sliding_window": None}) == [None] * 32
    assert windows(GEMMA2_9B) == [4096, None] * 21
    assert windows(GEMMA3_4B) == ([1024] * 5 + [None]) * 5 + [1024] * 4
    assert windows({**LLAMA_8B, "sliding_window": 4096}) == [None] * 32  # the class does not know the key
    late = {**QWEN3_8B, "sliding_window": 100, "max_window_layers": 30}
    assert windows(late) == [None] * 36  # use_sliding_window is false
    assert windows({**late, "use_sliding_window": True}) == [None] * 30 + [100] * 6
    types = ["sliding_attention", "full_attention"] * 18
    assert windows({**late, "use_sliding_window": True, "layer_types": types}) == [100, None] * 18


def test_the_language_model_of_a_model_with_images_is_read_and_said_so():
    model = read_model(GEMMA3_4B)
    assert model.weights.total == pytest.approx(3.88e9, rel=0.01)
    assert "only the language model of gemma3" in model.notes[0]
    outer = {"model_type": "llava", "tie_word_embeddings": True, "text_config": {**LLAMA_8B}}
    del outer["text_config"]["tie_word_embeddings"]
    assert read_model(outer).looked_up == 0


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "gemma3"])
def test_language_models_of_larger_ones_have_the_parameters_of_their_class(model_type):
    config = AutoConfig.for_model(model_type)
    text = config.text_config
    text.num_hidden_layers = 4
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:4]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    seeing = ("visual", "vision", "multi_modal")
    language = {name: p for name, p in model.named_parameters() if not any(part in name for part in seeing)}
    assert read_model(config.to_dict()).weights.total == sum(p.numel() for p in language.values())


def test_absent_kv_heads_are_as_many_as_queries_and_an_unknown_type_is_said_to_be():
    config = {key: value for key, value in LLAMA_8B.items() if key != "num_key_value_heads"}
    attention = read_model(config).layers[0].attention
    assert isinstance(attention, Softmax) and attention.num_kv_heads == 32
    model = read_model({**LLAMA_8B, "model_type": "llama9"})
    assert model.weights.total == read_model(LLAMA_8B).weights.total and "'llama9' is not known" in model.notes[0]
    assert "quantised" in read_model({**LLAMA_8B, "quantization_config": {"quant_method": "fp8"}}).notes[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "num_attention_heads"),
        ({**LLAMA_8B, "vocab_size": None}, "'vocab_size', got None"),
        ({**LLAMA_8B, "intermediate_size": -1}, "'intermediate_size', got -1"),
        ({**LLAMA_8B, "num_key_value_heads": 5}, "32 attention heads, not a multiple of its 5"),
        ({**DEEPSEEK_V3, "v_head_dim": None}, "v_head_dim"),
        ({**MIXTRAL, "num_experts_per_tok": None}, "num_experts_per_tok"),
        ({**MIXTRAL, "num_experts_per_tok": 9}, "num_experts_per_tok 9, more than its 8"),
        ({**QWEN3_8B, "layer_types": ["linear_attention"] * 36}, "'linear_attention'"),
        ({**QWEN3_8B, "layer_types": ["full_attention"]}, "1 layer_types for its 36"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder with a decoder"),
    ],
)
def test_what_a_config_lacks_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        read_model(config)
