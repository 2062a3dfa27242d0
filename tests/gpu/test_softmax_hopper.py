"""The kernels for Hopper GPUs: which calls they take, and what `tests/ops/softmax/test_triton.py` does not ask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import ops
from attnzoo.masks import Causal, Dilated, Full, Mask, SlidingWindow
from tests.ops.softmax.test_triton import LONG
from tests.support.attention import Case, assert_matches

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]


SQUARE = [
    case
    for case in LONG
    if case.dims[0] <= 128
    and case.name.removesuffix(", long")
    in (
        "full",
        "causal",
        "softcap",
        "sinks",
        "window",
        "both sides, square",
        "packed",
        "packed, window, softcap, sinks",
    )
]


@pytest.fixture(autouse=True)
def _short_calls_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from attnzoo.ops.softmax.triton import hopper_launch, launch

    monkeypatch.setattr(hopper_launch, "LEAST_REACH", 0)
    launch._RECORDED.clear()
    yield
    launch._RECORDED.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SQUARE, ids=lambda case: f"{case.name}, {case.dims}")
def test_output_logsumexp_and_gradients_are_as_accurate_as_plain_pytorch(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert_matches(case.draw(dtype), case.settings(), lse_weight=case.d_lse)


def draw(length: int = 700, heads: int = 4, k_heads: int = 2, dim: int = 128, **options: Any) -> list[Tensor]:
    options = {"device": "cuda", "dtype": torch.bfloat16} | options
    return [
        torch.randn(1, length, h, dim, **options).transpose(1, 2).requires_grad_() for h in (heads, k_heads, k_heads)
    ]


def both_ways(inputs: list[Tensor], d_out: Tensor, mask: Mask, **options: Any) -> list[Tensor]:
    out, lse = ops.attention(*inputs, mask=mask, return_lse=True, backend="triton", **options)
    return [out, lse, *torch.autograd.grad(out, inputs, d_out)]


@pytest.mark.parametrize(
    ("takes", "mask", "changes"),
    [
        (True, Causal(), {}),
        (True, Full(), {}),
        (True, SlidingWindow(100, ahead=3), {"softcap": 30.0}),
        (True, Causal(), {"cu_q": True}),
        (False, Causal(), {"length": 100}),
        (False, Dilated(10, 2), {}),
        (False, Causal(), {"dim": 192}),
        (False, Causal(), {"dtype": torch.float32}),
        (False, Causal(), {"softcap": 100.0}),
    ],
    ids=str,
)
def test_which_calls_they_take(takes: bool, mask: Mask, changes: dict[str, Any]) -> None:
    from attnzoo.ops.softmax.triton import hopper_launch
    from attnzoo.ops.softmax.triton.shapes import Arguments, pattern_of

    changes = dict(changes)
    softcap, packed = changes.pop("softcap", None), changes.pop("cu_q", False)
    q, k, v = draw(**changes)
    cu = torch.tensor([0, 300, 700], dtype=torch.int32, device="cuda") if packed else None
    x = Arguments(q, k, v, None, None, None, None, None, cu, cu, None, mask, 0.1, softcap, 0.0)
    assert hopper_launch.takes(x, pattern_of(x)) == takes


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("scale", [0.01, 0.3, 2.0])  # all scores near nothing, some on both sides, most at the cap
@pytest.mark.parametrize("mask", [Full(), Causal(), SlidingWindow(300)], ids=str)
def test_a_softcap_is_as_accurate_on_both_of_its_ways(mask: Mask, scale: float, dim: int) -> None:
    torch.manual_seed(0)
    case = Case("softcap", (4, 2), (900, 900), (dim, dim), 1, mask, {"softcap": 6.0, "scale": scale})
    assert_matches(case.draw(torch.bfloat16), case.settings())


@pytest.mark.parametrize("heads", [(1, 1), (40, 8), (96, 96)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_every_piece_is_worked_on_once_however_many_there_are(
    packed: bool, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnzoo.ops.softmax.triton import hopper_launch

    monkeypatch.setattr(hopper_launch, "CACHE", 1 << 20)  # sections of a few heads, every second one backwards
    torch.manual_seed(0)
    options = {"cu_seqlens_q": torch.tensor([0, 700, 717, 1400, 1900])} if packed else {}
    case = Case("many", heads, (2000, 2000), (128, 128), 1, Causal(), options)
    assert_matches(case.draw(torch.bfloat16), case.settings(), trains=False)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_documents_do_not_see_nan_in_others_or_in_the_tail(softcap: float | None, dim: int) -> None:
    torch.manual_seed(0)
    boundaries = [0, 61, 200, 203, 500, 690]
    cu = torch.tensor(boundaries, dtype=torch.int32, device="cuda")
    clean, d_out = draw(dim=dim), torch.randn(1, 4, 700, dim, device="cuda", dtype=torch.bfloat16)
    dirty, d_dirty = [t.detach().clone().requires_grad_() for t in clean], d_out.clone()
    with torch.no_grad():
        for t in (*dirty, d_dirty):
            t[:, :, 61:200] = math.nan  # a document
            t[:, :, 690:] = math.nan
    options = {"cu_seqlens_q": cu, "softcap": softcap}
    want, got = (both_ways(t, d, Causal(), **options) for t, d in ((clean, d_out), (dirty, d_dirty)))
    kept = torch.ones(700, dtype=torch.bool, device="cuda")
    kept[61:200] = False
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(b[:, :, kept], a[:, :, kept], rtol=0, atol=0)
    assert all((t[:, :, 690:] == 0).all() for n, t in enumerate(got) if n != 1)


@pytest.mark.parametrize("mask", [Full(), Causal(), SlidingWindow(150)], ids=str)
def test_a_call_that_is_made_again_gives_what_it_gave(mask: Mask) -> None:
    torch.manual_seed(0)
    inputs, d_out = draw(), torch.randn(1, 4, 700, 128, device="cuda", dtype=torch.bfloat16)
    first = both_ways(inputs, d_out, mask)
    both_ways(draw(), d_out, mask)  # other numbers, in other places, by the launches that were taken down
    again = both_ways([t.detach().clone().requires_grad_() for t in inputs], d_out.clone(), mask)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_an_address_off_the_grid_of_16_bytes_gives_the_same() -> None:
    torch.manual_seed(0)
    inputs, d_out = draw(), torch.randn(1, 4, 700, 128, device="cuda", dtype=torch.bfloat16)
    want = both_ways(inputs, d_out, Causal())
    shifted = []
    for t in inputs:
        place = (
            torch.empty(t.numel() + 1, device="cuda", dtype=t.dtype)[1:].view(1, 700, t.shape[1], 128).transpose(1, 2)
        )
        shifted.append(place.copy_(t.detach()).requires_grad_())
    for a, b in zip(want, both_ways(shifted, d_out, Causal()), strict=True):
        torch.testing.assert_close(b, a, rtol=2e-2, atol=2e-2)
