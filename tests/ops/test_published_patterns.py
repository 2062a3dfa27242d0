"""Longformer's and BigBird's attention in transformers against `attention` with our masks, on weights of their own.

Their exact differences of definition are tested too: see docs/mechanisms/sparse.md.
"""

from __future__ import annotations

from types import MethodType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BigBirdConfig, LongformerConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from attnzoo import ops
from attnzoo.masks import Blockwise, GlobalTokens, PerHead, RandomBlocks, SlidingWindow, big_bird, longformer

HEADS, DIM = 3, 24


def heads(projection: nn.Linear, x: Tensor) -> Tensor:
    """`[B, H, S, D]` of a projection of x `[B, S, dim]`."""
    return projection(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)


def joined(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(2)


def longformer_layer(window: int) -> LongformerSelfAttention:
    torch.manual_seed(0)
    config = LongformerConfig(hidden_size=DIM, num_attention_heads=HEADS, attention_window=[window])
    layer = LongformerSelfAttention(config, 0).double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def run_longformer(layer: LongformerSelfAttention, x: Tensor, tokens: tuple[int, ...], lengths: Tensor) -> Tensor:
    """The layer as LongformerModel calls it: 0 local, positive global, negative padding."""
    kind = torch.zeros(x.shape[:2], dtype=x.dtype)
    kind[:, list(tokens)] = 10000
    kind[torch.arange(x.shape[1]) >= lengths[:, None]] = -10000
    (out,) = layer(x.clone(), kind, kind < 0, kind > 0, bool(tokens))
    return out


@pytest.mark.parametrize("tokens", [(), (0,), (0, 1, 17, 40)])
@pytest.mark.parametrize("window", [4, 16])
def test_longformer_attention_is_ours_when_its_projections_for_global_tokens_are_the_others(window, tokens) -> None:
    layer = longformer_layer(window)
    for name in ("query", "key", "value"):
        getattr(layer, f"{name}_global").load_state_dict(getattr(layer, name).state_dict())
    x, lengths = torch.randn(2, 64, DIM, dtype=torch.float64), torch.tensor([64, 50])
    want = run_longformer(layer, x, tokens, lengths)
    q, k, v = (heads(projection, x) for projection in (layer.query, layer.key, layer.value))
    got = joined(ops.attention(q, k, v, mask=longformer(window, tokens), key_lengths=lengths))
    real = torch.arange(64) < lengths[:, None]
    # Its softmax runs in fp32 whatever the inputs.
    torch.testing.assert_close(got[real], want[real], rtol=0, atol=2e-6)


def test_longformer_with_projections_of_their_own_for_global_queries_is_two_calls() -> None:
    layer, tokens = longformer_layer(16), (0, 5, 33)
    x, lengths = torch.randn(2, 64, DIM, dtype=torch.float64), torch.tensor([64, 64])
    want = run_longformer(layer, x, tokens, lengths)
    q, k, v = (heads(projection, x) for projection in (layer.query, layer.key, layer.value))
    out = ops.attention(q, k, v, mask=longformer(16, tokens))
    q, k, v = (heads(projection, x) for projection in (layer.query_global, layer.key_global, layer.value_global))
    rows = list(tokens)
    out[:, :, rows] = ops.attention(q[:, :, rows], k, v)  # global queries: all keys, by the other projections
    torch.testing.assert_close(joined(out), want, rtol=0, atol=2e-6)


BLOCK, LENGTH, RANDOM = 4, 64, 2
BLOCKS = LENGTH // BLOCK


def big_bird_layer(training: bool) -> BigBirdBlockSparseAttention:
    torch.manual_seed(0)
    config = BigBirdConfig(
        hidden_size=DIM,
        num_attention_heads=HEADS,
        block_size=BLOCK,
        num_random_blocks=RANDOM,
        attention_type="block_sparse",
        max_position_embeddings=LENGTH,
    )
    layer = BigBirdBlockSparseAttention(config, seed=3).double().train(training)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def run_big_bird(layer: BigBirdBlockSparseAttention, x: Tensor, lengths: Tensor) -> Tensor:
    real = (torch.arange(LENGTH) < lengths[:, None]).double()
    blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(real, BLOCK)
    out, _ = layer(x, band, from_mask, to_mask, blocked, blocked)
    return out


def own_plan(layer: BigBirdBlockSparseAttention) -> np.ndarray:
    """The random blocks that transformers draws: `[heads, blocks - 2, random]`, from the second block to the last but
    one."""
    np.random.seed(layer.seed)
    lengths, numbers = layer._get_rand_attn_plan(LENGTH, BLOCK, RANDOM)
    return np.stack(layer._bigbird_block_rand_mask_with_head(LENGTH, LENGTH, BLOCK, BLOCK, HEADS, lengths, numbers))


def ours(layer: BigBirdBlockSparseAttention, x: Tensor, mask, lengths: Tensor) -> Tensor:
    q, k, v = (heads(projection, x) for projection in (layer.query, layer.key, layer.value))
    return joined(ops.attention(q, k, v, mask=mask, key_lengths=lengths))


def fixed() -> Tensor:
    """BigBird without its random blocks, `[LENGTH, LENGTH]`."""
    ends = GlobalTokens([*range(BLOCK), *range(LENGTH - BLOCK, LENGTH)])
    return (Blockwise(SlidingWindow(2, ahead=1), BLOCK) | ends).dense(LENGTH, LENGTH)


def test_big_bird_attention_is_ours_on_our_random_blocks() -> None:
    masks = [big_bird(BLOCK, random=RANDOM, seed=seed, length=LENGTH) for seed in range(HEADS)]
    plan = []
    for seed in range(HEADS):
        drawn = RandomBlocks(RANDOM, BLOCK, seed, length=LENGTH, near=1, edge=1).dense(LENGTH, LENGTH)
        plan.append([row.nonzero().flatten().tolist() for row in drawn[::BLOCK, ::BLOCK][1:-1]])
    layer = big_bird_layer(training=True)
    layer._bigbird_block_rand_mask_with_head = MethodType(lambda self, **options: np.array(plan), layer)
    x, lengths = torch.randn(2, LENGTH, DIM, dtype=torch.float64), torch.tensor([LENGTH, LENGTH])
    got = ours(layer, x, PerHead(masks), lengths)
    torch.testing.assert_close(got, run_big_bird(layer, x, lengths), rtol=0, atol=1e-9)


def test_big_bird_attention_is_ours_on_its_own_random_blocks_with_padding() -> None:
    layer = big_bird_layer(training=True)
    mask = fixed().repeat(HEADS, 1, 1)
    for head, rows in enumerate(own_plan(layer)):
        for a, row in enumerate(rows, start=1):
            for b in row:
                place = (head, slice(a * BLOCK, (a + 1) * BLOCK), slice(b * BLOCK, (b + 1) * BLOCK))
                assert not mask[place].any(), "its random blocks are never among the window's or the global ones"
                mask[place] = True
    x, lengths = torch.randn(2, LENGTH, DIM, dtype=torch.float64), torch.tensor([LENGTH, 45])
    got, want = ours(layer, x, mask, lengths), run_big_bird(layer, x, lengths)
    real = torch.arange(LENGTH) < lengths[:, None]
    torch.testing.assert_close(got[real], want[real], rtol=0, atol=1e-9)


def test_big_bird_in_eval_mode_draws_nothing_and_counts_the_first_block_again() -> None:
    layer = big_bird_layer(training=False)
    assert (own_plan(layer) == 0).all()
    x, lengths = torch.randn(1, LENGTH, DIM, dtype=torch.float64), torch.tensor([LENGTH])
    q, k, v = (heads(projection, x) for projection in (layer.query, layer.key, layer.value))
    k, v = (torch.cat([t, *[t[:, :, :BLOCK]] * RANDOM], dim=2) for t in (k, v))  # once for each random block
    again = torch.ones(LENGTH, RANDOM * BLOCK, dtype=torch.bool)
    again[:BLOCK] = again[-BLOCK:] = False
    got = joined(ops.attention(q, k, v, mask=torch.cat([fixed(), again], dim=1)))
    torch.testing.assert_close(got, run_big_bird(layer, x, lengths), rtol=0, atol=1e-9)
