"""Sparse patterns through `attention`: right, in work in proportion to the visible pairs, and in linear memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnzoo import ops
from attnzoo.masks import (
    Blockwise,
    Causal,
    Dilated,
    Documents,
    Full,
    GlobalTokens,
    Mask,
    PerHead,
    RandomBlocks,
    SlidingWindow,
    big_bird,
    longformer,
)
from attnzoo.ops.softmax.rows import Inputs, rows_of_tiles
from attnzoo.ops.softmax.tiled import tiled_attention, tiled_attention_backward

PATTERNS = [
    SlidingWindow(9, ahead=4),
    Dilated(5, 3),
    Dilated(40, 7, ahead=3),
    longformer(20, (0, 1, 99, 250)),
    longformer(10, (0, 130), dilation=4),
    longformer(33, 3, causal=True),
    RandomBlocks(2, 13),
    RandomBlocks(2, 1, seed=3) & Blockwise(Causal(), 7),
    big_bird(11, random=2, length=297),
    big_bird(16),
    Dilated(20, 3) & Documents([0, 100, 101, 250]) | GlobalTokens((7, 200)),
    PerHead([Dilated(9, 2), Dilated(9, 2), SlidingWindow(5), Full(), longformer(8, (3, 150)), RandomBlocks(3, 16)]),
    PerHead([SlidingWindow(30, ahead=2)] * 2 + [Dilated(3, 40)] * 4) & Causal(),
]


def inputs(heads: int, k_heads: int, q_len: int, k_len: int, dim: int = 4, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, q_len), (k_heads, k_len), (k_heads, k_len))
    return [torch.randn(batch, *s, dim, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def both(given: list[Tensor], **options) -> None:
    """The tiled backend gives what the reference gives: output, logsumexp and gradients."""
    results = []
    for backend in ("tiled", "reference"):
        out, lse = ops.attention(*given[:3], **options, return_lse=True, backend=backend)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        loss = (out * weights).sum() + (lse.masked_fill(lse == -math.inf, 0) ** 2).sum()
        results.append((out, lse, *torch.autograd.grad(loss, given)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mask", PATTERNS, ids=lambda mask: str(mask)[:30])
def test_tiled_equals_the_reference_for_every_pattern(mask: Mask) -> None:
    both(inputs(6, 2, 297, 297), mask=mask)
    both(inputs(6, 3, 5, 150), mask=mask, key_lengths=torch.tensor([150, 71]))


@pytest.mark.parametrize("mask", [PATTERNS[2], PATTERNS[3], PATTERNS[8], PATTERNS[11]], ids=lambda mask: str(mask)[:30])
def test_patterns_apply_inside_packed_documents_and_beside_sinks(mask: Mask) -> None:
    given = inputs(6, 2, 330, 320, batch=1)
    given.append(torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_())
    cu_q, cu_k = torch.tensor([0, 3, 3, 200, 325]), torch.tensor([0, 2, 6, 210, 300])
    both(given, mask=mask, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, sinks=given[3], softcap=4.0)


def computed(mask: Mask, q_len: int, k_len: int) -> int:
    """Elements of the score tiles that the tiled backend computes, over all heads."""
    q, k = torch.empty(1, mask.heads or 1, q_len, 1), torch.empty(1, 1, k_len, 1)
    rows = rows_of_tiles(Inputs(q, k, k, None, None, None, None, None, None, mask.text, 1.0, 0.0, 0.0))

    def size(s: slice) -> int:
        return len(range(s.start, s.stop, s.step))

    return sum(size(r.queries) * sum(map(size, r.keys)) * (r.q_heads.stop - r.q_heads.start) for r in rows)


@pytest.mark.parametrize(
    ("mask", "factor"),
    [
        (SlidingWindow(64), 2.01),
        (SlidingWindow(1024), 1.13),
        (SlidingWindow(129, ahead=128), 1.51),
        (Dilated(64, 8), 2.01),
        (Dilated(128, 8, ahead=16), 2.6),
        (Dilated(32, 30), 2.4),
        (longformer(512, 1), 1.25),
        (longformer(256, (0, 100, 2500)), 1.52),
        (longformer(128, (0, 3000), dilation=8), 2.6),
        (longformer(512, 4, causal=True), 1.3),
        (RandomBlocks(3, 16), 1.01),
        (RandomBlocks(3, 64, length=4096), 1.01),
        (big_bird(64, length=4096), 1.01),
        (big_bird(64), 1.1),
        (PerHead([longformer(512, 1), Dilated(64, 8), big_bird(64)]), 1.4),
    ],
    ids=lambda value: str(value)[:30],
)
def test_work_is_in_proportion_to_the_visible_pairs(mask: Mask, factor: float) -> None:
    length, heads = 4096, mask.heads or 1
    visible, walked = mask.density(length, length) * length**2 * heads, computed(mask, length, length)
    assert visible <= walked <= factor * visible
    assert computed(mask, 2 * length, 2 * length) <= 2.3 * walked
    assert computed(mask, 1, length) <= length * heads


class Allocations(TorchDispatchMode):
    """Remembers the largest tensor that any operation gives."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("make", [lambda n: big_bird(64, length=n), lambda n: longformer(128, (0, 4500), dilation=8)])
def test_memory_is_linear_up_to_32k_tokens_forward_and_backward(make) -> None:
    largest = {}
    for length in (8192, 32768):
        q, k, v = torch.randn(3, 1, 1, length, 8)
        rest = (None, None, None, None, None, None, make(length).text, 8**-0.5, 0.0, 0.0)
        with Allocations() as seen:
            out, lse = tiled_attention._init_fn(q, k, v, *rest)
            d_out, d_lse = torch.ones_like(out), torch.zeros_like(lse)
            grads = tiled_attention_backward._init_fn(d_out, d_lse, q, k, v, *rest)
        assert all(g.isfinite().all() for g in (out, lse, *grads))
        largest[length] = seen.largest
    assert largest[32768] <= 4.1 * largest[8192]
    assert largest[32768] <= 64 * 32768 * 4  # the scores of a block of global queries over all keys, in fp32


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize(
    "mask", [RandomBlocks(1, 2), PerHead([GlobalTokens((3,)) & Dilated(1, 2), RandomBlocks(1, 3)])]
)
def test_a_query_without_a_visible_key_gives_zeros_and_no_gradient(mask: Mask, backend: str) -> None:
    q, k, v = inputs(2, 1, 8, 8)
    sees = mask.dense(8, 8).expand(2, 8, 8).any(-1)  # [heads, queries]
    assert sees.any() and not sees.all()
    out, lse = ops.attention(q, k, v, mask=mask, return_lse=True, backend=backend)
    assert (out[:, ~sees] == 0).all() and (out[:, sees] != 0).all()
    assert torch.equal(lse == -math.inf, ~sees.expand(2, 2, 8))
    grads = torch.autograd.grad(out.sum(), [q, k, v])
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, ~sees] == 0).all() and (grads[0][:, sees] != 0).any()


@pytest.mark.parametrize("mask", [PATTERNS[3], PATTERNS[8], PerHead([Dilated(2, 2), GlobalTokens(1)])])
def test_gradcheck_passes(mask: Mask) -> None:
    given = inputs(mask.heads or 2, 1, 7, 9, dim=2, batch=1)
    assert torch.autograd.gradcheck(lambda *t: ops.attention(*t, mask=mask, backend="tiled"), given)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_patterns_compile_without_a_graph_break(backend: str) -> None:
    given = inputs(2, 1, 40, 40)
    for mask in (longformer(8, (0, 20)), big_bird(4, length=40), PerHead([Dilated(2, 2), RandomBlocks(2, 4)])):

        def run(q: Tensor, k: Tensor, v: Tensor, mask: Mask = mask) -> Tensor:
            return ops.attention(q, k, v, mask=mask, backend=backend)

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*given), run(*given))
        grads = [torch.autograd.grad(f(*given).square().sum(), given) for f in (compiled, run)]
        torch.testing.assert_close(*grads)


def test_a_mask_for_another_number_of_heads_is_refused_by_name() -> None:
    given = inputs(4, 2, 3, 3)
    with pytest.raises(ValueError, match="mask must be made for the 4 query heads of q, got one for 3"):
        ops.attention(*given, mask=PerHead([Causal()] * 3) & Full())


def test_a_two_sided_window_that_sees_every_key_is_not_taken_for_causal() -> None:
    given = inputs(2, 1, 6, 6)
    torch.testing.assert_close(ops.attention(*given, mask=SlidingWindow(9, ahead=9)), ops.attention(*given))
