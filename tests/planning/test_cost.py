"""What a plan says of memory, arithmetic and traffic, against caches that are allocated and FLOPs that are counted."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from attnzoo.caches import ContiguousCache, Int8Cache, LatentCache, RollingCache
from attnzoo.layers import GroupedQueryAttention, LinearAttention, MultiHeadLatentAttention
from attnzoo.masks import Causal, Dilated, Full, GlobalTokens, Mask, SlidingWindow, longformer
from attnzoo.planning import Gpu, Model, cost_of, plan, read_model, with_int8, with_spec
from attnzoo.planning.attention import Latent, Softmax
from attnzoo.planning.recurrent import Recurrent
from attnzoo.planning.visible import visible_pairs, visible_to_last
from attnzoo.planning.weights import experts, feed_forward
from attnzoo.specs import GQA, MLA, Linear
from tests.planning.configs import DEEPSEEK_V3, GEMMA2_9B, LLAMA_8B, LLAMA_405B, MISTRAL_V1, SMOLLM2, llama

TINY = llama(48, 64, 2, 6, 3, 100)
DTYPES = [("float32", torch.float32), ("bfloat16", torch.bfloat16)]


def allocated(holder: Any) -> int:
    """Bytes of all memory that a cache refers to, found in whatever it consists of; counts of tokens left out."""
    found: dict[int, int] = {}

    def search(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            if part.dtype not in (torch.int64, torch.int32):
                found[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        elif isinstance(part, list | tuple):
            for item in part:
                search(item)
        elif type(part).__module__.startswith("attnzoo.caches"):
            for item in vars(part).values():
                search(item)

    search(holder)
    return sum(found.values())


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
@pytest.mark.parametrize("tokens", [3, 100])
def test_the_planned_cache_is_as_large_as_the_one_that_is_allocated(name, dtype, tokens):
    size, model = dtype.itemsize, read_model(TINY)  # 2 layers, 3 KV heads of 8
    slots = min(tokens, 10)
    of_spec: list[tuple[Model, Any]] = [
        (model, ContiguousCache(1, 3, tokens, 8, dtype=dtype)),
        (with_spec(model, GQA(6)), ContiguousCache(1, 6, tokens, 8, dtype=dtype)),
        (with_spec(model, GQA(1, SlidingWindow(10))), RollingCache(1, 1, slots, 8, dtype=dtype)),
        (
            with_spec(model, GQA(mask=longformer(10, 4, causal=True))),
            RollingCache(1, 3, 10, 8, prefix=4, dtype=dtype)
            if tokens > 14
            else ContiguousCache(1, 3, tokens, 8, dtype=dtype),
        ),
        (
            with_spec(model, GQA(mask=longformer(10, (0, 50), causal=True))),
            ContiguousCache(1, 3, tokens, 8, dtype=dtype),
        ),
        (with_int8(model), Int8Cache(1, 3, tokens, 8, dtype=dtype)),
        (with_spec(model, MLA(32, qk_rope_head_dim=16)), LatentCache(1, tokens, 32, 16, dtype=dtype)),
        (
            with_int8(with_spec(model, MLA(32, qk_rope_head_dim=16))),
            Int8Cache(1, 1, tokens, 32, 16, dtype=dtype),
        ),
    ]
    for planned, cache in of_spec:
        assert planned.cache_bytes(tokens, size) == 2 * allocated(cache) == 2 * cache.nbytes, type(cache)


LINEAR = [
    Linear(),
    Linear(num_kv_heads=1, normalize=False),
    Linear(feature_map="favor", num_features=20),
    Linear(feature_map="favor"),
    Linear(feature_map="hedgehog"),
    Linear(feature_map="elu", window=5),
    Linear(feature_map="hedgehog", window=64),
]


@pytest.mark.parametrize("spec", LINEAR, ids=str)
@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_the_planned_state_is_as_large_as_the_one_of_the_layer_and_so_are_its_parameters(spec, name, dtype):
    planned = with_spec(read_model(TINY), spec).layers[0].attention
    values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    layer = LinearAttention(48, 6, **{**values, "num_kv_heads": spec.num_kv_heads or 3}).to(dtype)
    assert 0 < planned.cache_bytes(77, dtype.itemsize) == allocated(layer.new_cache(1))
    assert planned.weights(48).total == sum(parameter.numel() for parameter in layer.parameters())


def test_planned_attention_has_the_parameters_of_the_layers_here():
    def count(layer: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in layer.parameters())

    assert Softmax(6, 3, 8, 8, qkv_bias=True, out_bias=True, qk_norm="head").weights(48).total == count(
        GroupedQueryAttention(48, 6, 3, bias=True, out_bias=True, qk_norm=True)
    )
    sizes = {"kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
    for rank in (None, 20):
        layer = MultiHeadLatentAttention(48, 6, **sizes, q_lora_rank=rank, bias=True)
        assert Latent(6, **sizes, q_lora_rank=rank, bias=True).weights(48).total == count(layer)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "deepseek_v3"])
def test_forward_flops_are_those_that_the_counter_counts(model_type):
    sizes = {
        "llama": {"num_key_value_heads": 2, "head_dim": 24},
        "gpt2": {"vocab_size": 80},
        "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": None},
        "deepseek_v3": {"num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2}
        | {"topk_group": 1, "kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
        | {"v_head_dim": 20, "moe_intermediate_size": 40, "first_k_dense_replace": 1},
    }[model_type]
    config = AutoConfig.for_model(
        model_type,
        vocab_size=sizes.pop("vocab_size", 80),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        **({} if model_type == "gpt2" else {"intermediate_size": 96}),
        **sizes,
        attn_implementation="eager",
    )
    model, tokens = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval(), 37
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(80, (1, tokens)), use_cache=False)
    by_module = counter.get_flop_counts()
    rotation = sum(sum(ops.values()) for name, ops in by_module.items() if name.endswith("rotary_emb"))  # its angles
    planned = read_model(config.to_dict())
    # The counter sees all S x S scores; the plan those that are visible.
    full = sum(dataclasses.replace(layer.attention, mask=Full()).flops(tokens) for layer in planned.layers)
    assert 2 * planned.weights.matmul * tokens + full == counter.get_total_flops() - rotation
    half = sum(layer.attention.flops(tokens) for layer in planned.layers)
    assert half * 2 * tokens == full * (tokens + 1)
    cost = cost_of(planned, Gpu(), context=tokens, batch=1, dtype="bfloat16")
    assert cost.training_flops_per_token == pytest.approx(6 * planned.weights.matmul + 3 * half / tokens, rel=1e-12)


def test_linear_attention_is_counted_as_its_recurrence_and_grows_with_length_only():
    planned = Recurrent(Softmax(6, 3, 8, 8))
    with FlopCounterMode(display=False) as counter:
        q, k, v = torch.randn(6, 1, 8), torch.randn(3, 1, 8), torch.randn(3, 1, 8)
        state = k.transpose(1, 2) @ v
        q @ state.repeat_interleave(2, 0)
    assert planned.decode_flops(1000) == counter.get_total_flops()
    # A chunk of 64: its tokens enter the state and read it, and see one another, of which half is visible.
    inside = Softmax(6, 6, 8, 8, Full()).flops(64) * 65 // 128
    assert planned.flops(64 * 50) == 50 * planned.flops(64) == 50 * (64 * planned.decode_flops(1) + inside)
    assert planned.decode_bytes(1000, 2) == 2 * planned.cache_bytes(1000, 2)  # the state is read and written
    assert planned.standard_bytes(1000, 2) == 2 * (1000 * 9 * 16 + 4 * 6 * 1000**2)
    near = Recurrent(Softmax(6, 3, 8, 8), window=16)
    assert near.flops(640) - planned.flops(640) == Softmax(6, 3, 8, 8, SlidingWindow(16)).flops(640)
    drawn = Recurrent(Softmax(6, 3, 8, 8), "favor", 20)
    assert drawn.decode_flops(9) == 2 * 9 * 20 * 8 + 2 * 9 * 8 * 20


MASKS: list[Mask] = [
    Causal(),
    Full(),
    SlidingWindow(7),
    SlidingWindow(7, 3),
    Dilated(5, 3),
    longformer(20, 3, causal=True),
    SlidingWindow(9) | (GlobalTokens(2) & Causal()),
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 111])
def test_visible_pairs_are_those_of_the_mask_written_out(mask, tokens):
    dense = mask.dense(tokens, tokens)
    assert visible_pairs(mask, tokens) == dense.sum()
    assert visible_to_last(mask, tokens) == dense[-1].sum()


def test_int8_is_for_layers_that_no_window_bounds():
    mistral, gemma = read_model(MISTRAL_V1), read_model(GEMMA2_9B)
    assert with_int8(mistral) == mistral
    assert [layer.attention.int8 for layer in with_int8(gemma).layers] == [False, True] * 21


def test_visible_pairs_of_a_long_sequence_are_near_the_truth():
    mask = longformer(256, 16, causal=True)
    assert visible_pairs(mask, 3000) == pytest.approx(int(mask.dense(3000, 3000).sum()), rel=0.002)


def test_standard_traffic_grows_as_the_square_and_tiled_traffic_by_what_fits_on_the_chip():
    one = Softmax(1, 1, 64, 64, Full())
    n, d, size = 8192, 64, 2
    assert one.standard_bytes(n, size) == size * (4 * n * d + 4 * n * n)
    sram = 128 * 1024
    rows = sram // size // (4 * d)  # of queries in a block; keys and values pass once for each
    assert one.tiled_bytes(n, size, sram) == size * (2 * n * d + 2 * n * d * n // rows)
    # Theta(N^2 d^2 / M): four times for twice N or d, half for twice M.
    big = 1 << 20
    tiled = one.tiled_bytes(big, size, sram)
    assert one.tiled_bytes(2 * big, size, sram) == pytest.approx(4 * tiled, rel=0.01)
    assert Softmax(1, 1, 128, 128, Full()).tiled_bytes(big, size, sram) == pytest.approx(4 * tiled, rel=0.01)
    assert one.tiled_bytes(big, size, 2 * sram) == pytest.approx(tiled / 2, rel=0.01)
    causal = dataclasses.replace(one, mask=None)
    assert causal.tiled_bytes(big, size, sram) == pytest.approx(tiled / 2, rel=0.01)
    # Nothing comes to the chip less than once; and what is linear stays linear.
    assert one.tiled_bytes(64, size, 1 << 30) == size * 4 * 64 * d
    linear = Recurrent(one)
    assert linear.tiled_bytes(2 * n, size, sram) == 2 * linear.tiled_bytes(n, size, sram)
    assert linear.tiled_bytes(n, size, 1 << 30) == size * 4 * n * d < linear.tiled_bytes(n, size, 4 * d * d // 2)


@pytest.mark.parametrize("config", [LLAMA_8B, MISTRAL_V1, SMOLLM2], ids=["llama", "mistral", "smollm2"])
def test_the_largest_batch_and_context_fit_and_one_more_does_not(config):
    gpu, context, batch = Gpu(memory_gb=24), 3000, 3
    for row in plan(config, gpu=gpu, context=context, batch=batch, also=[GQA(3)]).rows:
        if row.cost is None:
            continue
        model = with_int8(read_model(config)) if "int8" in row.name else read_model(config)
        model = model if row.spec is None else with_spec(model, row.spec)
        room = 24e9 * 0.9 - row.cost.weight_bytes
        assert row.cost.max_batch * row.cost.kv_bytes <= room < (row.cost.max_batch + 1) * row.cost.kv_bytes
        longest = row.cost.max_context
        if longest is None:
            assert batch * model.cache_bytes(10**12, 2) <= room
        else:
            assert batch * model.cache_bytes(longest, 2) <= room < batch * model.cache_bytes(longest + 1, 2)


def test_decoding_moves_the_weights_once_a_step_and_the_cache_once_a_sequence():
    gpu = Gpu(memory_gb=1e6, bandwidth_gbs=1000, tflops=1e9)  # bound by memory alone
    model = read_model(LLAMA_8B)
    weights = (model.weights.total - 128256 * 4096) * 2  # of the embeddings a row is read
    for batch in (1, 64):
        cost = cost_of(model, gpu, context=4096, batch=batch, dtype="bfloat16")
        assert cost.decode_seconds == pytest.approx((weights + batch * 4096 * 131072) / 1e12, rel=1e-12)
        assert cost.decode_bound == "memory" and cost.tokens_per_s == batch / cost.decode_seconds
    slow = cost_of(model, Gpu(tflops=0.1), context=4096, batch=4, dtype="bfloat16")
    attention = 32 * 2 * 32 * 256 * 4096
    assert slow.decode_bound == "compute"
    assert slow.decode_seconds == pytest.approx(4 * (2 * model.weights.matmul + attention) / 1e11, rel=1e-12)
    eight = cost_of(model, dataclasses.replace(gpu, count=8), context=4096, batch=64, dtype="bfloat16")
    assert eight.decode_seconds == pytest.approx(cost.decode_seconds / 8)


def test_a_batch_reads_the_experts_that_any_of_its_tokens_is_sent_to():
    weights = experts(feed_forward(8, 16, gated=True), 4, 2)
    assert weights.read(1) == weights.active == weights.total / 2
    assert weights.read(2) == weights.total * 3 / 4
    torch.manual_seed(0)
    sent = torch.rand(4000, 5, 4).topk(2).indices  # 4000 batches of 5 tokens
    used = torch.zeros(4000, 4).scatter_(1, sent.flatten(1), 1.0).sum(1).mean()
    assert weights.read(5) / weights.total == pytest.approx(float(used) / 4, rel=0.01)


def test_absorbed_decoding_of_deepseek_costs_the_known_flops_and_bytes():
    attention = read_model(DEEPSEEK_V3).layers[0].attention
    assert attention.decode_flops(1000) == 2 * 128 * (576 + 512) * 1000
    assert attention.decode_bytes(1000, 2) == 576 * 2 * 1000
    assert attention.flops(2) == 2 * 128 * (192 + 128) * 3


def test_a_model_that_is_too_large_has_batch_0_and_says_how_many_gpus_hold_it():
    cost = plan(LLAMA_405B).rows[0].cost
    assert cost is not None and (cost.max_batch, cost.max_context) == (0, 0)
    assert cost.gpus == math.ceil((cost.weight_bytes + cost.kv_bytes) / 72e9) == 12
    held = plan(LLAMA_405B, gpu=Gpu(count=12)).rows[0].cost
    assert held is not None and held.max_batch >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 0}, "context must be a positive integer, got 0"),
        ({"batch": 1.5}, "batch must be a positive integer"),
        ({"dtype": "int4"}, "dtype must be one of float32, bfloat16, float16, float8, got 'int4'"),
        ({"window": 0}, "window must be an integer of at least 1"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(TINY, **arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory_gb", 0),
        ("bandwidth_gbs", -1),
        ("tflops", "many"),
        ("reserve", 1),
        ("count", 1.5),
        ("sram_kb", math.inf),
    ],
)
def test_a_gpu_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"gpu.{name} must be"):
        Gpu(**{name: value})
