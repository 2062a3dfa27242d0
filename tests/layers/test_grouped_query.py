"""Grouped-query attention without a cache: against paper and pencil, against transformers, and its own invariants."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

import attnzoo
from attnzoo.layers import GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention, RotaryEmbedding
from attnzoo.layers.inputs import packed_positions
from attnzoo.masks import Causal, Full, SlidingWindow
from tests.layers.naive import naive_layer

DIM, HEADS, KV_HEADS, SIZE = 24, 4, 2, 6


def make(heads: int = HEADS, kv_heads: int = KV_HEADS, **options: Any) -> GroupedQueryAttention:
    """A small fp64 layer with rotation, whose norms are not all ones."""
    torch.manual_seed(0)
    options.setdefault("rope", RotaryEmbedding(options.get("head_dim", DIM // heads), base=100.0))
    layer = GroupedQueryAttention(DIM, heads, kv_heads, **options).double()
    if options.get("qk_norm"):
        torch.nn.init.uniform_(layer.q_norm.weight, 0.5, 1.5)
        torch.nn.init.uniform_(layer.k_norm.weight, 0.5, 1.5)
    return layer


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"rope": None, "mask": None},
    {"bias": True, "qk_norm": True},
    {"bias": True, "out_bias": False, "mask": Full()},
    {"out_bias": True, "mask": SlidingWindow(3)},
    {"head_dim": 10, "rope": RotaryEmbedding(10, rotary_dim=4, layout="interleaved")},
    {"scale": 0.3, "softcap": 1.5, "mask": SlidingWindow(2) | SlidingWindow(6) & Causal()},
    {"heads": 6, "kv_heads": 2},
    {"heads": 3, "kv_heads": 3},
    {"heads": 8, "kv_heads": 1, "head_dim": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_the_layer_is_the_textbook(options: dict[str, Any]) -> None:
    layer, x, context = make(**options), tokens(2, 7), tokens(2, 5)
    close(layer(x), torch.stack([naive_layer(layer, row) for row in x]))
    crossed = [naive_layer(layer, row, context=keys) for row, keys in zip(x, context, strict=True)]
    close(layer(x, context=context), torch.stack(crossed))


def test_biases_are_where_they_were_asked_for() -> None:
    layer = make(bias=True, out_bias=False)
    assert layer.q_proj.bias is not None and layer.k_proj.bias is not None and layer.v_proj.bias is not None
    assert layer.o_proj.bias is None
    assert make(bias=True).o_proj.bias is not None
    assert make(out_bias=True).q_proj.bias is None


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 6)])
def test_given_positions_rotate_and_leave_the_mask_alone(shape: tuple[int, ...]) -> None:
    layer, x = make(), tokens(2, 6)
    positions = torch.randint(0, 50, shape)
    rows = positions.expand(2, 6)
    close(layer(x, positions=positions), torch.stack([naive_layer(layer, x[b], positions=rows[b]) for b in range(2)]))


def test_multi_head_and_multi_query_are_grouped_query_at_its_ends() -> None:
    x = tokens(2, 5)
    for layer, kv_heads in (
        (MultiHeadAttention(DIM, HEADS, bias=True, qk_norm=True), HEADS),
        (MultiQueryAttention(DIM, HEADS, mask=SlidingWindow(2)), 1),
    ):
        assert layer.num_kv_heads == kv_heads
        layer = layer.double()
        close(layer(x), torch.stack([naive_layer(layer, row) for row in x]))
    assert attnzoo.MultiHeadAttention is MultiHeadAttention


def test_grouped_query_is_multi_head_with_repeated_keys() -> None:
    grouped, full, x = make(bias=True), make(kv_heads=HEADS, bias=True), tokens(2, 6)
    state = grouped.state_dict()
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        state[name] = state[name].unflatten(0, (KV_HEADS, SIZE)).repeat_interleave(HEADS // KV_HEADS, 0).flatten(0, 1)
    full.load_state_dict(state)
    close(full(x), grouped(x))


def test_a_window_as_long_as_the_sequence_is_causal() -> None:
    x = tokens(2, 6)
    close(make(mask=SlidingWindow(6))(x), make()(x))
    assert not torch.allclose(make(mask=SlidingWindow(5))(x), make()(x))


def test_a_permuted_batch_gives_permuted_outputs() -> None:
    layer, x, order = make(qk_norm=True), tokens(5, 4), torch.tensor([3, 0, 4, 1, 2])
    close(layer(x[order]), layer(x)[order])


@pytest.mark.parametrize("mask", [Causal(), Full(), SlidingWindow(2)], ids=str)
def test_packed_documents_are_a_loop_over_documents_whatever_stands_after_them(mask: Any) -> None:
    layer, x = make(mask=mask, bias=True), tokens(1, 11)
    x[:, 9:] = torch.nan
    bounds = [0, 4, 4, 5, 9]
    packed, loop = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = layer(packed, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    each = torch.cat([layer(loop[:, a:b]) for a, b in pairwise(bounds) if b > a], dim=1)
    close(out[:, :9], each)
    assert out[:, 9:].isfinite().all()

    weights = torch.randn_like(each)
    parameters = list(layer.parameters())
    ours = torch.autograd.grad((out[:, :9] * weights).sum(), [packed, *parameters])
    theirs = torch.autograd.grad((each * weights).sum(), [loop, *parameters])
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other)


def test_positions_of_packed_documents_start_anew() -> None:
    places, lengths = packed_positions(torch.tensor([0, 2, 2, 5], dtype=torch.int32), 5)
    assert places.tolist() == [0, 1, 0, 1, 2]
    assert lengths.tolist() == [2, 2, 3, 3, 3]


@pytest.mark.parametrize("mask", [Causal(), None, SlidingWindow(2)], ids=str)
def test_padded_rows_equal_unpadded_ones_whatever_stands_in_the_padding(mask: Any) -> None:
    layer, x = make(mask=mask, bias=True, qk_norm=True), tokens(4, 6)
    lengths = [6, 2, 5, 0]
    for row, length in enumerate(lengths):
        x[row, length:] = torch.nan
    padded, alone = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = layer(padded, key_lengths=torch.tensor(lengths))
    assert out.isfinite().all()
    real = torch.cat([out[row, :length] for row, length in enumerate(lengths)])
    each = torch.cat([layer(alone[row : row + 1, :length])[0] for row, length in enumerate(lengths) if length])
    close(real, each)

    weights = torch.randn_like(each)
    parameters = list(layer.parameters())
    ours = torch.autograd.grad((real * weights).sum(), [padded, *parameters])
    theirs = torch.autograd.grad((each * weights).sum(), [alone, *parameters])
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other)


def test_a_padded_context_equals_an_unpadded_one() -> None:
    layer, x, context = make(bias=True), tokens(3, 4), tokens(3, 6)
    lengths = [6, 1, 3]
    for row, length in enumerate(lengths):
        context[row, length:] = torch.nan
    out = layer(x, context=context, key_lengths=torch.tensor(lengths))
    for row, length in enumerate(lengths):
        close(out[row : row + 1], layer(x[row : row + 1], context=context[row : row + 1, :length]))


def test_dynamic_scaling_keeps_rows_and_documents_apart() -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 3}
    layer, x = make(rope=RotaryEmbedding(SIZE, scaling=scaling)), tokens(1, 9)
    short, long = layer(x[:, :4]), layer(x[:, 4:])
    close(layer(x, cu_seqlens=torch.tensor([0, 4, 9]))[:, :4], short)
    both = torch.cat([torch.nn.functional.pad(x[:, :4], (0, 0, 0, 1)), x[:, 4:]])
    close(layer(both, key_lengths=torch.tensor([4, 5]))[:1, :4], short)
    close(layer(both, key_lengths=torch.tensor([4, 5]))[1:], long)


def test_gradients_are_right_in_fp64() -> None:
    layer = make(bias=True, qk_norm=True, softcap=2.0, mask=SlidingWindow(3))
    lengths = torch.tensor([4, 3])
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        out = torch.func.functional_call(
            layer, dict(zip(names, parameters, strict=True)), (x,), {"key_lengths": lengths}
        )
        return out * (torch.arange(4) < lengths[:, None])[..., None]

    inputs = [tokens(2, 4).requires_grad_(), *(p.detach().clone().requires_grad_() for p in layer.parameters())]
    torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_dropout_acts_in_training_only_and_keeps_the_mean() -> None:
    layer, x = make(dropout=0.4), tokens(1, 4)
    plain = make()(x)
    close(layer.eval()(x), plain)
    layer.train()
    torch.manual_seed(1)
    draws = layer(x.expand(4000, -1, -1))
    assert not torch.allclose(draws[0], draws[1])
    torch.testing.assert_close(draws.mean(0, keepdim=True), plain, rtol=0, atol=0.02)
    crossed = layer(x.expand(2, -1, -1), context=x.expand(2, -1, -1))
    assert not torch.allclose(crossed[0], crossed[1])


def test_autocast_runs_in_its_dtype() -> None:
    layer, x = make(qk_norm=True, bias=True).float(), tokens(2, 5).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        keys, values = layer.project_kv(x)
    assert out.dtype == keys.dtype == values.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), rtol=0, atol=0.03)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_outputs_are_those_of_transformers_for_the_same_weights(family: str) -> None:
    sizes = {"hidden_size": DIM, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": 8}
    torch.manual_seed(0)
    if family == "llama":
        config = LlamaConfig(**sizes, attention_bias=True, attn_implementation="sdpa")
        theirs = LlamaAttention(config, 0).double()
    else:
        config = Qwen3Config(**sizes, attn_implementation="sdpa")
        theirs = Qwen3Attention(config, 0).double()
        for norm in (theirs.q_norm, theirs.k_norm):
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    rope = RotaryEmbedding(8, base=10000.0)
    ours = GroupedQueryAttention(
        DIM, HEADS, KV_HEADS, head_dim=8, bias=family == "llama", qk_norm=family == "qwen3", rope=rope
    ).double()
    ours.load_state_dict(theirs.state_dict())
    x = tokens(2, 9)
    cos, sin = rope(torch.arange(9).expand(2, 9), dtype=torch.float64)
    expected, _ = theirs.eval()(x, (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)), attention_mask=None)
    # Qwen3's norm computes in fp32 whatever it is given.
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-12 if family == "llama" else 1e-6)


@pytest.mark.parametrize("kind", ["plain", "padded", "packed", "cross"])
def test_the_layer_compiles_into_one_graph(kind: str) -> None:
    layer = make(bias=True, qk_norm=True, mask=SlidingWindow(3) if kind == "padded" else Causal())
    x = tokens(1, 8)
    inputs: dict[str, Tensor] = {
        "plain": {},
        "padded": {"key_lengths": torch.tensor([5])},
        "packed": {"cu_seqlens": torch.tensor([0, 3, 7], dtype=torch.int32)},
        "cross": {"context": tokens(1, 4)},
    }[kind]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if kind == "plain" else "aot_eager")
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = compiled(ours, **inputs), layer(theirs, **inputs)
    close(out, expected)
    close(*(torch.autograd.grad(y.pow(2).sum(), given)[0] for y, given in ((out, ours), (expected, theirs))))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((25, 4, 2), {}, "dim is 25"),
        ((24, 4, 3), {}, "num_kv_heads is 3"),
        ((24, 4, 0), {}, "num_kv_heads is 0"),
        ((24, 4, 8), {}, "num_kv_heads is 8"),
        ((24, 4, 2), {"head_dim": 0}, "head_dim is 0"),
        ((24, 4, 2), {"rope": RotaryEmbedding(8)}, "rope has head_dim 8"),
        ((24, 4, 2), {"mask": "causal"}, "mask is a str"),
        ((24, 4, 2), {"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_layers_that_cannot_be_are_refused(arguments: tuple[int, int, int], options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupedQueryAttention(*arguments, **options)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": torch.ones(2, 3, 23)}, r"x has shape \[2, 3, 23\]"),
        ({"x": torch.ones(3, 24)}, r"x has shape \[3, 24\]"),
        ({"context": torch.ones(2, 3, 25)}, r"context has shape \[2, 3, 25\]"),
        ({"context": torch.ones(3, 3, 24)}, "context has batch 3"),
        ({"context": torch.ones(2, 3, 24), "positions": torch.arange(3)}, "positions given with context"),
        ({"positions": torch.arange(4)}, "positions is torch.int64 of shape"),
        ({"positions": torch.zeros(3, 3, dtype=torch.int64)}, "positions is torch.int64 of shape"),
        ({"positions": torch.ones(3)}, "positions is torch.float32"),
        ({"key_lengths": torch.tensor([3])}, "key_lengths is torch.int64 of shape"),
        ({"key_lengths": torch.tensor([3.0, 1.0])}, "key_lengths is torch.float32"),
        ({"key_lengths": torch.tensor([3, 4])}, r"key_lengths is \[3, 4\]"),
        ({"key_lengths": torch.tensor([-1, 3])}, r"key_lengths is \[-1, 3\]"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens given with batch 2"),
        ({"x": torch.ones(1, 3, 24), "cu_seqlens": torch.tensor([3])}, "cu_seqlens is torch.int64 of shape"),
        ({"x": torch.ones(1, 3, 24), "cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens"),
        ({"x": torch.ones(1, 3, 24), "cu_seqlens": torch.tensor([0, 2, 1])}, "cu_seqlens"),
        (
            {"x": torch.ones(1, 3, 24), "cu_seqlens": torch.tensor([0, 3]), "key_lengths": torch.tensor([3])},
            "key_lengths given with cu_seqlens",
        ),
        (
            {"x": torch.ones(1, 3, 24), "cu_seqlens": torch.tensor([0, 3]), "context": torch.ones(1, 3, 24)},
            "context given with cu_seqlens",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(inputs: dict[str, Tensor], message: str) -> None:
    layer = make().float()
    with pytest.raises(ValueError, match=message):
        layer(**{"x": torch.ones(2, 3, 24), **inputs})
