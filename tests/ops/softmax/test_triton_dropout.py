"""Dropout in the fused kernels: how much is kept, and that the backward drops what the forward dropped.

Values that are the identity show the weights themselves, and with them what was dropped; the rest is held to attention
written out with just those weights dropped.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import ops
from attnzoo.masks import Causal, Dilated, Mask, SlidingWindow, longformer
from tests.support.attention import DEVICE, DTYPES, Case, assert_matches

pytest.importorskip("triton")


def kept(case: Case, p: float, seed: int, **options: Any) -> Tensor:
    """Which weights survive, bool `[B, Hq, Sq, Sk]`; all scores are equal, so none of them is 0 by itself."""
    q = torch.zeros(case.batch, case.heads[0], case.lengths[0], 16, device=DEVICE)
    k = torch.zeros(case.batch, case.heads[1], case.lengths[1], 16, device=DEVICE)
    v = torch.eye(case.lengths[1], device=DEVICE).expand(case.batch, case.heads[1], -1, -1)
    torch.manual_seed(seed)
    return ops.attention(q, k, v, dropout_p=p, backend="triton", **options) > 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_of_kept_weights_is_what_was_asked_for(p: float) -> None:
    keep = kept(Case("", heads=(4, 2), lengths=(64, 64), batch=2), p, seed=0).double()
    deviation = math.sqrt(p * (1 - p) / keep.numel())
    assert abs(keep.mean() - (1 - p)) < 4 * deviation
    for along in ((0, 1, 2), (0, 1, 3), (2, 3)):  # no key, no query and no head is dropped more often than others
        each = keep.mean(along)
        deviation = math.sqrt(p * (1 - p) * each.numel() / keep.numel())
        assert (each - (1 - p)).abs().max() < 5 * deviation


def test_heads_batch_entries_queries_and_keys_are_dropped_independently() -> None:
    keep = kept(Case("", heads=(4, 2), lengths=(64, 64), batch=2), 0.5, seed=1).double() - 0.5
    pairs = [
        (keep[:, :1], keep[:, 1:2]),
        (keep[:, :1], keep[:, 2:3]),
        (keep[:1], keep[1:]),
        (keep[..., 1:, :], keep[..., :-1, :]),
        (keep[..., 1:], keep[..., :-1]),
        (keep, keep.mT),
        (keep, kept(Case("", heads=(4, 2), lengths=(64, 64), batch=2), 0.5, seed=2).double() - 0.5),
    ]
    for a, b in pairs:
        correlation = 4 * (a * b).mean().item()
        assert abs(correlation) < 5 / math.sqrt(a.numel())


def test_the_draw_is_of_the_seed_and_the_place_alone() -> None:
    case = Case("", heads=(2, 1), lengths=(37, 41), batch=1)
    first = kept(case, 0.5, seed=3)
    assert torch.equal(first, kept(case, 0.5, seed=3))
    assert not torch.equal(first, kept(case, 0.5, seed=4))
    seen = SlidingWindow(9, ahead=5).dense(37, 41, device=DEVICE)
    assert torch.equal(first & seen, kept(case, 0.5, seed=3, mask=SlidingWindow(9, ahead=5)))
    seen = Dilated(4, 3).dense(37, 41, device=DEVICE)
    assert torch.equal(first & seen, kept(case, 0.5, seed=3, mask=Dilated(4, 3)))


CASES: list[tuple[str, Mask | None, dict[str, Any]]] = [
    ("full", None, {}),
    ("causal", Causal(), {}),
    ("softcap, sinks", Causal(), {"softcap": 3.0, "sinks": torch.tensor([0.5, -1.0])}),
    ("padding, ALiBi", None, {"key_lengths": torch.tensor([20, 0]), "alibi_slopes": torch.tensor([0.3, 0.1])}),
    ("packed", Causal(), {"cu_seqlens_q": torch.tensor([0, 5, 5, 30])}),
    ("dilated", Dilated(4, 2), {}),
    ("listed", longformer(6, (0, 20)), {}),
    ("bias", Causal(), {"bias": torch.linspace(-1, 1, 37 * 37).reshape(37, 37)}),
]


@pytest.mark.parametrize(("name", "mask", "options"), CASES, ids=[case[0] for case in CASES])
def test_output_and_gradients_are_those_of_attention_with_the_same_weights_dropped(name, mask, options) -> None:
    case = Case(name, mask=mask, options={**options, "dropout_p": 0.4}, batch=1 if name == "packed" else 2)
    plain = {n: v for n, v in case.settings().items() if n in ("mask", "key_lengths", "cu_seqlens_q")}
    keep = kept(case, 0.4, seed=5, **plain)
    torch.manual_seed(6)
    inputs, settings = case.draw(DTYPES[-1]), case.settings()
    torch.manual_seed(5)  # the seed of the draw is the first number that attention asks for
    assert_matches(inputs, settings, keep=keep)


def test_the_logsumexp_knows_nothing_of_dropout() -> None:
    q, k, v = (t.detach() for t in Case("").draw(torch.float32))
    _, with_dropout = ops.attention(q, k, v, dropout_p=0.5, return_lse=True, backend="triton")
    _, without = ops.attention(q, k, v, return_lse=True, backend="triton")
    torch.testing.assert_close(with_dropout, without, rtol=0, atol=0)
