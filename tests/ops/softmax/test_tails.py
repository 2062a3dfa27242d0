"""Rows past the last of packed documents, in place and in a copy, by the kernel and by plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnzoo.ops.softmax import tails
from tests.support.attention import DEVICE

END, LENGTH = 70, 130


def some(kind: str) -> Tensor:
    if kind == "numbers of rows":
        return torch.randn(1, 3, LENGTH, device=DEVICE)
    if kind == "columns apart":
        return torch.randn(1, 3, LENGTH, 48, device=DEVICE)[..., ::2]
    t = torch.randn(1, LENGTH, 3, 24, device=DEVICE, dtype=torch.float16)
    return t.transpose(1, 2) if kind == "heads inside rows" else t.transpose(1, 2).contiguous()


@pytest.mark.parametrize("end", [0, END, LENGTH])
@pytest.mark.parametrize("kind", ["numbers of rows", "columns apart", "heads inside rows", "heads apart"])
@pytest.mark.parametrize("value", [0.0, -math.inf])
@pytest.mark.parametrize("fused", [False, True])
def test_only_what_lies_past_the_last_document_is_written(monkeypatch, fused, value, kind, end) -> None:
    if not fused:
        monkeypatch.setattr(tails, "triton_reasons", lambda device: ["not now"])
    t = some(kind)
    with torch.no_grad():
        t[:, :, END:] = math.nan
        t[:, :, END - 1 : END] = math.inf
    boundaries, before = torch.tensor([0, 3, 3, end], device=DEVICE), t.clone()
    found = tails.clear(t, boundaries, value)
    assert found is t and (t[:, :, end:] == value).all()
    torch.testing.assert_close(t[:, :, :end], before[:, :, :end], rtol=0, atol=0, equal_nan=True)


def test_a_copy_leaves_its_source_as_it_is_and_laid_out_alike() -> None:
    t = some("heads inside rows")
    before = t.clone()
    found = tails.cleared(t, torch.tensor([0, END], dtype=torch.int32, device=DEVICE))
    assert (found[:, :, END:] == 0).all() and torch.equal(found[:, :, :END], before[:, :, :END])
    assert torch.equal(t, before) and found.stride() == t.stride()
