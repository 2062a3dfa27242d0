"""Layers with a pattern of their own: the window, and any mask, with and without a cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.caches import ContiguousCache
from attnzoo.layers import GroupedQueryAttention, RotaryEmbedding, SlidingWindowAttention, SparseAttention
from attnzoo.masks import Causal, Dilated, Mask, PerHead, RandomBlocks, SlidingWindow, big_bird, longformer
from tests.layers.naive import naive_layer

DIM, HEADS = 24, 4
DECODERS = [
    SlidingWindow(3),
    longformer(4, (0, 6), causal=True),
    Dilated(3, 2) | SlidingWindow(2),
    big_bird(3, random=1),
    PerHead([SlidingWindow(2), Dilated(2, 3), Causal(), RandomBlocks(1, 2) | SlidingWindow(1)]),
]
ENCODERS = [longformer(4, (0, 6)), big_bird(2, random=1, length=20), Dilated(2, 3, ahead=2)]


def sparse(mask: Mask, **options) -> SparseAttention:
    torch.manual_seed(0)
    return SparseAttention(DIM, HEADS, mask, rope=RotaryEmbedding(DIM // HEADS), **options).double()


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", [*DECODERS, *ENCODERS], ids=lambda mask: str(mask)[:30])
@pytest.mark.parametrize("kv_heads", [None, 2])
def test_a_sparse_layer_is_the_textbook_with_its_mask(mask: Mask, kv_heads: int | None) -> None:
    layer, x = sparse(mask, num_kv_heads=kv_heads), tokens(2, 20)
    assert layer.num_kv_heads == (kv_heads or HEADS)
    close(layer(x), torch.stack([naive_layer(layer, row) for row in x]))


@pytest.mark.parametrize("ahead", [0, 3])
def test_the_window_layer_is_the_sparse_layer_with_a_window(ahead: int) -> None:
    layer = SlidingWindowAttention(DIM, HEADS, 5, num_kv_heads=2, ahead=ahead, bias=True, qk_norm=True).double()
    other = GroupedQueryAttention(DIM, HEADS, 2, bias=True, qk_norm=True, mask=SlidingWindow(5, ahead)).double()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(tokens(2, 12)), other(tokens(2, 12)))
    assert SlidingWindowAttention(DIM, HEADS, 5).num_kv_heads == HEADS


@pytest.mark.parametrize("mask", DECODERS, ids=lambda mask: str(mask)[:30])
def test_prefill_and_single_steps_over_a_cache_give_what_one_pass_gives(mask: Mask) -> None:
    layer, x = sparse(mask, num_kv_heads=2).eval(), tokens(2, 17)
    cache = ContiguousCache(2, 2, 17, DIM // HEADS, dtype=torch.float64, device="cpu")
    parts = [layer(part, cache=cache) for part in x.split([7, 4, 1, 1, 3, 1], dim=1)]
    close(torch.cat(parts, dim=1), layer(x))


def test_packed_and_padded_sequences_keep_their_pattern() -> None:
    for mask in (longformer(4, (0, 6)), DECODERS[4]):
        layer, x = sparse(mask), tokens(1, 20)
        packed = layer(x, cu_seqlens=torch.tensor([0, 9, 20], dtype=torch.int32))
        close(packed, torch.cat([layer(x[:, :9]), layer(x[:, 9:])], dim=1))
        padded = layer(x.expand(2, -1, -1), key_lengths=torch.tensor([20, 13]))
        close(padded[1, :13], layer(x[:, :13])[0])


def test_bad_layers_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="mask is made for 3 heads; num_heads is 4"):
        SparseAttention(DIM, HEADS, PerHead([Causal()] * 3))
    with pytest.raises(ValueError, match="window must be an integer of at least 1, got 0"):
        SlidingWindowAttention(DIM, HEADS, 0)
    with pytest.raises(ValueError, match="mask is a str"):
        SparseAttention(DIM, HEADS, "causal")
    assert attnzoo.SparseAttention is SparseAttention and attnzoo.SlidingWindowAttention is SlidingWindowAttention


def test_a_sparse_layer_compiles_without_a_graph_break_and_trains() -> None:
    layer, x = sparse(DECODERS[4]), tokens(1, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(run(x).square().sum(), list(layer.parameters())) for run in (compiled, layer)]
    torch.testing.assert_close(*grads)
