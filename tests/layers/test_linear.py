"""The linear attention layer: against a loop over its own projections, its feature maps, its cache, its refusals."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnzoo
from attnzoo.caches import ContiguousCache, RecurrentStateCache
from attnzoo.layers import LinearAttention, RotaryEmbedding, apply_rotary
from attnzoo.layers.feature_maps import Hedgehog, RandomFeatures, orthogonal_directions
from attnzoo.specs import Linear, spec_from_dict
from tests.ops.naive_linear import MAPS, all_to_all, near_and_far, token_by_token

DIM, HEADS, KV_HEADS, SIZE = 24, 4, 2, 6


def make(**options: Any) -> LinearAttention:
    """A small fp64 layer with rotation, whose learned maps and window factors are not what they started as."""
    torch.manual_seed(0)
    options.setdefault("num_kv_heads", KV_HEADS)
    options.setdefault("rope", RotaryEmbedding(options.get("head_dim", SIZE), base=100.0))
    layer = LinearAttention(DIM, HEADS, **options).double()
    for name, parameter in layer.named_parameters():
        if "learned_map" in name or "window" in name:
            torch.nn.init.normal_(parameter)
    return layer


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, dtype=torch.float64)


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def naive(layer: LinearAttention, x: Tensor, context: Tensor | None = None) -> Tensor:
    """One row `[S, dim]` by the layer's weights and loops alone."""

    def heads(projection: torch.nn.Linear, source: Tensor, count: int) -> Tensor:
        return projection(source).reshape(len(source), count, layer.head_dim).transpose(0, 1)

    source = x if context is None else context
    q, k, v = (
        heads(layer.q_proj, x, layer.num_heads),
        heads(layer.k_proj, source, layer.num_kv_heads),
        heads(layer.v_proj, source, layer.num_kv_heads),
    )
    if layer.rope is not None and context is None:
        cos, sin = layer.rope(torch.arange(len(x)), dtype=torch.float64)
        q, k = (apply_rotary(t[None], cos, sin)[0] for t in (q, k))
    if layer.feature_map == "hedgehog":
        maps = layer.learned_map
        f_q, f_k = (
            torch.stack(
                [torch.cat([(t @ w).softmax(-1), (-t @ w).softmax(-1)], -1) for t, w in zip(each, ws, strict=True)]
            )
            for each, ws in ((q, maps.q_weight), (k, maps.k_weight))
        )
    elif layer.feature_map == "favor":
        w = layer.learned_map.directions.double()
        f_q, f_k = (
            torch.exp(t * SIZE**-0.25 @ w.T - (t * SIZE**-0.25).square().sum(-1, keepdim=True) / 2) for t in (q, k)
        )
    else:
        f_q, f_k = q, k
    own = layer.feature_map if layer.feature_map in MAPS else "identity"
    if layer.window is not None:
        f_q, f_k = MAPS[own](f_q), MAPS[own](f_k)
        out = near_and_far(q, k, v, f_q, f_k, layer.window, layer.window_factors.sigmoid())
    elif context is not None or not layer.causal:
        out = all_to_all(f_q, f_k, v, own, layer.normalize, layer.head_dim**-0.5)
    else:
        decay = None if layer.log_decay is None else layer.log_decay.exp().tolist()
        scale = layer.head_dim**-0.5 if layer.scale is None else layer.scale
        out, _, _ = token_by_token(f_q, f_k, v, own, layer.normalize, decay, scale)
    return layer.o_proj(out.transpose(0, 1).flatten(1))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"feature_map": "relu", "bias": True, "rope": None, "num_kv_heads": None},
    {"feature_map": "identity", "normalize": False, "decay": "retnet"},
    {"normalize": False, "scale": 0.7, "decay": [0.5, 1.0]},
    {"feature_map": "favor", "num_features": 11},
    {"feature_map": "hedgehog", "decay": [0.9, 0.8], "num_kv_heads": 2},
    {"feature_map": "hedgehog", "normalize": False},
    {"window": 4},
    {"window": 1, "feature_map": "relu", "num_kv_heads": 1},
    {"window": 3, "feature_map": "hedgehog"},
]


def named(options: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in options.items()) or "plain"


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_the_layer_is_a_loop_over_its_projections(options: dict[str, Any]) -> None:
    layer, x = make(**options), tokens(2, 13)
    close(layer(x), torch.stack([naive(layer, row) for row in x]))


@pytest.mark.parametrize("options", [{}, {"feature_map": "favor"}, {"feature_map": "hedgehog", "normalize": False}])
def test_bidirectional_and_cross_attention_see_everything(options: dict[str, Any]) -> None:
    layer, x, context = make(causal=False, **options), tokens(2, 7), tokens(2, 5)
    close(layer(x), torch.stack([naive(layer, row) for row in x]))
    for each in (layer, make(**options)):
        crossed = each(x, context=context)
        close(crossed, torch.stack([naive(each, *rows) for rows in zip(x, context, strict=True)]))
        cache = each.new_cache(2)
        close(each(x[:, :3], context=context, cache=cache), crossed[:, :3])
        close(each(x[:, 3:], context=torch.full_like(context, torch.nan), cache=cache), crossed[:, 3:])
        dirty = context.clone()
        dirty[1, 2:] = torch.nan
        padded = each(x, context=dirty, key_lengths=torch.tensor([5, 2]))
        close(padded[1], naive(each, x[1], context[1, :2]))


@pytest.mark.parametrize("options", [*OPTIONS[:1], *OPTIONS[2:6], *OPTIONS[7:8], {"causal": False}], ids=named)
@pytest.mark.parametrize("packed", [True, False])
def test_packed_and_padded_rows_equal_those_alone_whatever_stands_in_between(
    options: dict[str, Any], packed: bool
) -> None:
    layer, x = make(**options), tokens(1, 19) if packed else tokens(4, 9)
    if packed:
        x[:, 17:] = torch.nan
        ends = [0, 4, 4, 15, 17]
        places = [(0, slice(a, b)) for a, b in pairwise(ends)]
        given = {"cu_seqlens": torch.tensor(ends, dtype=torch.int32)}
    else:
        lengths = [9, 2, 5, 0]
        for row, length in enumerate(lengths):
            x[row, length:] = torch.nan
        places = [(row, slice(0, length)) for row, length in enumerate(lengths)]
        given = {"key_lengths": torch.tensor(lengths)}
    together, alone = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = layer(together, **given)
    assert out.isfinite().all()
    real = torch.cat([out[row, at] for row, at in places])
    each = torch.cat([layer(alone[row : row + 1, at])[0] for row, at in places if at.stop > at.start])
    close(real, each)
    weights, parameters = torch.randn_like(each), list(layer.parameters())
    ours = torch.autograd.grad((real * weights).sum(), [together, *parameters])
    theirs = torch.autograd.grad((each * weights).sum(), [alone, *parameters])
    close(ours, theirs)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(OPTIONS), st.integers(0, 3))
def test_any_split_of_a_sequence_gives_what_one_pass_gives(data: st.DataObject, options: Any, rollback: int) -> None:
    layer, x = make(**options).eval(), tokens(2, 24)
    full, cache = layer(x).detach(), layer.new_cache(2, rollback=rollback)
    at = [0, 0]
    while min(at) < 24:
        room = 24 - max(at)
        kind = data.draw(st.sampled_from(["chunk", "step", "speculate", "padded"]))
        if kind == "padded" or room == 0:
            counts = [data.draw(st.integers(0, min(5, 24 - n))) for n in at]
            if max(counts) == 0:
                counts = [min(1, 24 - n) for n in at]
            given = {"key_lengths": torch.tensor(counts)}
        else:
            counts = [data.draw(st.integers(1, room)) if kind == "chunk" else 1] * 2
            given = {}
        if kind == "speculate" and rollback and at[0] == at[1] and room:
            guess = data.draw(st.integers(1, rollback))
            with torch.no_grad():
                layer(tokens(2, guess), cache=cache)
            cache.crop(at[0])
        new = torch.full((2, max(counts), DIM), torch.nan, dtype=torch.float64)
        for b, count in enumerate(counts):
            new[b, :count] = x[b, at[b] : at[b] + count]
        with torch.no_grad():
            out = layer(new, cache=cache, **given)
        for b, count in enumerate(counts):
            close(out[b, :count], full[b, at[b] : at[b] + count])
            at[b] += count


def test_beams_and_samples_go_on_from_reordered_states() -> None:
    layer, x = make(window=3).eval(), tokens(2, 9)
    cache = layer.new_cache(2)
    with torch.no_grad():
        layer(x[:, :7], cache=cache)
        cache.repeat(2)
        cache.reorder(torch.tensor([2, 1, 0, 3]))
        rows = torch.tensor([1, 0, 0, 1])
        close(layer(x[rows, 7:], cache=cache), layer(x)[rows, 7:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [*OPTIONS[2:3], *OPTIONS[4:5], *OPTIONS[9:]], ids=named)
def test_lower_precision_decodes_as_it_prefills(options: dict[str, Any], dtype: torch.dtype) -> None:
    layer, x = make(**options).to(dtype), tokens(1, 12).to(dtype)
    with torch.no_grad():
        full, cache = layer(x), layer.new_cache(1, rollback=2)
        steps = torch.cat([layer(x[:, t : t + 1], cache=cache) for t in range(12)], dim=1)
        truth = make(**options).to(dtype).double()(x.double())
    assert full.dtype == dtype and cache.state.s.dtype == torch.float32
    for got in (full, steps):
        torch.testing.assert_close(got.double(), truth, rtol=0.0, atol=0.03 if dtype == torch.bfloat16 else 1e-5)


def test_autocast_runs_in_its_dtype() -> None:
    x = tokens(2, 9).float()
    for options in ({}, {"window": 3}, {"feature_map": "favor"}, {"feature_map": "hedgehog"}):
        layer = make(**options).float()
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            out = layer(x)
            cached = layer(x, cache=layer.new_cache(2, dtype=torch.bfloat16))
        assert out.dtype == cached.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), layer(x), rtol=0, atol=0.05)
        torch.testing.assert_close(cached.float(), layer(x), rtol=0, atol=0.05)


@pytest.mark.parametrize("options", [OPTIONS[3], OPTIONS[4], OPTIONS[9]], ids=named)
def test_gradients_are_right_in_fp64(options: dict[str, Any]) -> None:
    layer, lengths = make(**options, qk_norm=True, bias=True), torch.tensor([4, 3])
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        out = torch.func.functional_call(layer, given, (x,), {"key_lengths": lengths})
        return out * (torch.arange(4) < lengths[:, None])[..., None]

    inputs = [tokens(2, 4).requires_grad_(), *(p.detach().clone().requires_grad_() for p in layer.parameters())]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("options", [OPTIONS[2], OPTIONS[4], OPTIONS[9]], ids=named)
def test_the_layer_compiles_into_one_graph(options: dict[str, Any]) -> None:
    layer, x = make(**options), tokens(1, 40)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    given = {"cu_seqlens": torch.tensor([0, 9, 36], dtype=torch.int32)}
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, want = compiled(ours, **given), layer(theirs, **given)
    close(out[:, :36], want[:, :36])
    close(*(torch.autograd.grad(y[:, :36].pow(2).sum(), t)[0] for y, t in ((out, ours), (want, theirs))))
    torch._dynamo.reset()
    step = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        cache, full = layer.new_cache(1, rollback=0 if options is OPTIONS[2] else 1), layer(x)
        layer(x[:, :20], cache=cache)
        for t in range(20, 24):
            close(step(x[:, t : t + 1], cache=cache), full[:, t : t + 1])


def test_random_features_estimate_the_softmax_kernel_and_their_factors_cancel() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (0.4 * torch.randn(50, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    want = (q @ k.T * 8**-0.5).softmax(-1)
    errors = []
    for count in (16, 65536):
        maps = RandomFeatures(8, count).double()
        kernel = maps(q, query=True) @ maps(k, query=False).T
        errors.append((kernel / kernel.sum(-1, keepdim=True) - want).abs().mean().item())
        w, x, y = maps.directions, q * 8**-0.25, k * 8**-0.25
        plain = (
            torch.exp(x @ w.T - x.square().sum(-1, keepdim=True) / 2)
            @ torch.exp(y @ w.T - y.square().sum(-1, keepdim=True) / 2).T
        )
        close(kernel / kernel.sum(-1, keepdim=True), plain / plain.sum(-1, keepdim=True))
    assert 10 * errors[1] < 1e-3 < errors[0]  # falls with the root of their number
    wide = RandomFeatures(128)
    assert wide.out_dim == int(128 * math.log(128))
    for size in (1.0, 60.0):
        x = size * torch.randn(20, 128)
        assert wide(x, query=True).isfinite().all() and wide(x, query=False).isfinite().all()
        assert wide(x.bfloat16(), query=True).dtype == torch.float32


def test_directions_are_orthogonal_gaussian_and_redrawn_by_seed() -> None:
    directions = orthogonal_directions(37, 16, seed=3)
    blocks = directions.split(16)
    assert [len(block) for block in blocks] == [16, 16, 5]
    for block in blocks:
        products = block @ block.T
        assert (products - products.diag().diag()).abs().max() < 1e-4
    many = torch.cat([orthogonal_directions(16, 16, seed) for seed in range(200)])
    assert many.mean().abs() < 0.02 and (many.var() - 1).abs() < 0.05
    layer = make(feature_map="favor", num_features=9)
    before = layer.learned_map.directions.clone()
    layer.learned_map.redraw(5)
    assert not torch.equal(layer.learned_map.directions, before)
    again = make(feature_map="favor", num_features=9)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.learned_map.directions, layer.learned_map.directions)
    again.learned_map.redraw(0)
    assert torch.equal(again.learned_map.directions, before)


def test_hedgehog_starts_from_the_identity_and_learns() -> None:
    maps, x = Hedgehog(2, 1, 3), torch.randn(1, 2, 4, 3)
    want = torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1)
    torch.testing.assert_close(maps(x, query=True), want)
    layer = LinearAttention(DIM, HEADS, num_kv_heads=KV_HEADS, feature_map="hedgehog", window=3)
    layer(torch.randn(1, 9, DIM)).sum().backward()
    for name in ("learned_map.q_weight", "learned_map.k_weight", "window_factors"):
        assert layer.get_parameter(name).grad.abs().sum() > 0
    torch.testing.assert_close(layer.window_factors.sigmoid(), torch.full((HEADS,), 0.1))


def test_the_decay_keeps_its_precision_when_the_model_is_cast_or_moved() -> None:
    layer = LinearAttention(DIM, HEADS, decay="retnet")
    assert layer.decay == tuple(1 - 2.0 ** (-5 - h) for h in range(HEADS))
    want = torch.tensor([math.log(d) for d in layer.decay])
    with torch.device("meta"):
        empty = LinearAttention(DIM, HEADS, decay="retnet")
    for each in (layer.bfloat16(), layer.double().float(), empty.to_empty(device="cpu")):
        assert torch.equal(each.log_decay, want) and "log_decay" not in each.state_dict()
    assert layer.double().log_decay.dtype == torch.float64
    assert math.exp(layer.log_decay[0].item()) == pytest.approx(1 - 1 / 32, abs=1e-15)


def test_its_names_are_public_and_its_weights_those_of_grouped_query_attention() -> None:
    assert attnzoo.LinearAttention is LinearAttention and attnzoo.Linear is Linear
    grouped = attnzoo.GroupedQueryAttention(DIM, HEADS, KV_HEADS, bias=True, qk_norm=True)
    make(bias=True, qk_norm=True).load_state_dict(grouped.state_dict())


@pytest.mark.parametrize("spec", [Linear(), Linear(2, "hedgehog", window=8), Linear(decay=(0.5, 1.0), normalize=False)])
def test_a_spec_round_trips_through_json(spec: Linear) -> None:
    assert spec_from_dict(json.loads(json.dumps(spec.to_dict()))) == spec and hash(spec) is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads is 3"),
        ({"feature_map": "exp"}, "feature_map must be one of"),
        ({"num_features": 8}, "num_features must be None but for feature_map 'favor', got 8"),
        ({"feature_map": "favor", "normalize": False}, "normalize must be True for feature_map 'favor'"),
        ({"feature_map": "favor", "scale": -1.0}, "scale is -1.0"),
        ({"window": 0}, "window must be a positive integer or None, got 0"),
        ({"window": 4, "normalize": False}, "window needs normalize"),
        ({"window": 4, "decay": "retnet"}, "window needs normalize, no decay"),
        ({"window": 4, "feature_map": "favor"}, "a feature_map other than 'favor'"),
        ({"window": 4, "causal": False}, "causal is False with decay None and window 4"),
        ({"decay": "retnet", "causal": False}, "causal is False with decay 'retnet'"),
        ({"decay": "slow"}, "decay must be 'retnet', None or numbers"),
        ({"decay": [0.5, 1.5]}, r"decay must be 'retnet', None or numbers in \(0, 1\]"),
        ({"decay": [0.5]}, "decay has 1 numbers; there are 4 key/value heads"),
    ],
)
def test_layers_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearAttention(DIM, HEADS, **options)


def test_inputs_that_do_not_fit_are_named() -> None:
    layer, x = make(), tokens(2, 3)
    other = RecurrentStateCache(2, KV_HEADS, SIZE, feature_map="elu", normalize=False, dtype=torch.float64)
    cases: list[tuple[LinearAttention, dict[str, Any], str]] = [
        (layer, {"cache": ContiguousCache(2, KV_HEADS, 9, SIZE)}, "cache is a ContiguousCache"),
        (layer, {"cache": layer.new_cache(3)}, "cache is made for batch"),
        (layer, {"cache": other}, "cache is made for normalize False; here it is True"),
        (layer, {"cache": make(window=3).new_cache(2)}, "cache is made for window 3; here it is None"),
        (layer, {"cache": make(decay="retnet").new_cache(2)}, "must both have a decay"),
        (make(causal=False), {"cache": layer.new_cache(2)}, "a layer that is not causal"),
        (layer, {"context": x, "cache": layer.new_cache(2, rollback=1)}, "cache has rollback 1"),
        (make(window=3), {"context": x}, "context given to a layer with a window or a decay"),
        (layer, {"x": torch.ones(2, 3, 23)}, r"x has shape \[2, 3, 23\]"),
        (layer, {"key_lengths": torch.tensor([4, 1])}, r"key_lengths is \[4, 1\]"),
    ]
    for each, inputs, message in cases:
        with pytest.raises(ValueError, match=message):
            each(**{"x": x, **inputs})
