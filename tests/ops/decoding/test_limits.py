"""Masks as three numbers: they say exactly what the mask says, or there are none."""

from __future__ import annotations

import pytest
import torch

from attnzoo.masks import (
    Causal,
    Dilated,
    Documents,
    Full,
    GlobalTokens,
    Mask,
    PerHead,
    SlidingWindow,
    big_bird,
    longformer,
)
from attnzoo.ops.decoding.limits import Limits, limits

FIRST = GlobalTokens(3) & Causal()
DESCRIBED = [
    Full(),
    Causal(),
    SlidingWindow(4),
    SlidingWindow(3, 2),
    FIRST,
    Causal() & GlobalTokens((0, 1, 2)),
    SlidingWindow(4) | FIRST,
    FIRST | SlidingWindow(4),
    SlidingWindow(4, 1) | FIRST,
    (SlidingWindow(4) | GlobalTokens(3)) & Causal(),
    (SlidingWindow(4, 2) | GlobalTokens(3)) & Causal(),
    (SlidingWindow(4) | FIRST) & Full(),
    Full() & (SlidingWindow(4, 3) | FIRST),
    SlidingWindow(4) | GlobalTokens(0) & Causal(),
    SlidingWindow(2) | SlidingWindow(5) & Causal(),
    SlidingWindow(2, 3) & SlidingWindow(5, 1),
    SlidingWindow(5) & (Causal() | FIRST),
    SlidingWindow(1) | GlobalTokens(20) & Causal(),
    longformer(8, 2, causal=True),
]
OTHERS = [
    GlobalTokens(3),
    SlidingWindow(4) | GlobalTokens(3),
    GlobalTokens(3) & SlidingWindow(4),
    (SlidingWindow(4) | FIRST) & SlidingWindow(6),
    SlidingWindow(4) | GlobalTokens((1, 2)) & Causal(),
    SlidingWindow(4) | Dilated(2, 3),
    SlidingWindow(4) & Documents((0, 5)),
    PerHead([Causal(), SlidingWindow(4)]),
    big_bird(2, random=1),
]


@pytest.mark.parametrize("mask", DESCRIBED, ids=str)
def test_the_numbers_say_what_the_mask_says(mask: Mask) -> None:
    found = limits(mask)
    assert found is not None
    i, j = torch.arange(14)[:, None], torch.arange(14)
    numbered = ((-found.ahead <= i - j) & (i - j < found.back)) | ((j < found.prefix) & (j <= i))
    assert torch.equal(numbered, mask.visible(i, j))


@pytest.mark.parametrize("mask", OTHERS, ids=str)
def test_other_masks_have_none(mask: Mask) -> None:
    assert limits(mask) is None


def test_a_window_and_first_tokens_are_told_apart() -> None:
    assert limits(SlidingWindow(252) | (GlobalTokens(4) & Causal())) == Limits(252, 0, 4)
