"""Launches made again: other tensors and numbers of the same form, and nothing else taken for granted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnzoo.caches import ContiguousCache
from attnzoo.masks import Causal
from attnzoo.ops import decode
from attnzoo.ops.decoding.triton import op
from attnzoo.ops.decoding.triton.repeating import Plans, Repeat


class Compiled:
    """Stands in for a launcher: takes down what would be launched, and how."""

    def __init__(self) -> None:
        self.slow: list[tuple[Any, ...]] = []
        self.fast: list[tuple[Any, ...]] = []

    def __call__(self, grid: Any, arguments: Any, constants: Any, **options: int) -> None:
        self.launched(grid, arguments, constants)

    def launched(self, grid: Any, arguments: Any, constants: Any, **options: int) -> tuple[Any, list[Any]]:
        self.slow.append(tuple(arguments))
        return lambda *given: self.fast.append(given), list(constants.values())


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of the CPU
    return Compiled()


def test_the_second_launch_gets_addresses_and_numbers_of_its_own(launcher: Compiled) -> None:
    repeat = Repeat(launcher, (3, 1, 1), (7, 0.5), {"SIZE": 16})
    first, second = torch.zeros(64), torch.zeros(64)
    repeat((first, None), (1, 2))
    repeat((second, None), (3, 4))
    assert launcher.slow == [(first, None, 1, 2, 7, 0.5)]
    assert launcher.fast == [(second.data_ptr(), None, 3, 4, 7, 0.5, 16)]


def test_addresses_that_are_no_multiples_of_16_are_launched_anew(launcher: Compiled) -> None:
    repeat, x = Repeat(launcher, (1, 1, 1), (), {}), torch.zeros(64)
    for tensor in (x[1:], x, x[1:], x):
        repeat((tensor,))
    assert len(launcher.slow) == 3 and launcher.fast == [(x.data_ptr(),)]


def test_on_another_device_than_the_current_one_it_is_launched_anew(
    launcher: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeat, x = Repeat(launcher, (1, 1, 1), (), {}), torch.zeros(64)
    repeat((x,))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    repeat((x,))
    assert len(launcher.slow) == 2 and not launcher.fast


def test_plans_are_made_once_a_form() -> None:
    plans: Plans[list[int]] = Plans()
    made = [plans.get(form, list) for form in ("a", "b", "a")]
    assert made[0] is made[2] and made[0] is not made[1]


def test_calls_of_one_form_share_a_plan_and_others_do_not() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    op.plans.clear()

    def call(heads: int, length: int, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        cache = ContiguousCache(1, 1, 64, 16, dtype=dtype, device=device)
        cache.append(*(torch.randn(1, 1, length, 16, device=device, dtype=dtype) for _ in range(2)))
        decode(torch.randn(1, heads, 1, 16, device=device, dtype=dtype), cache, backend="triton", **options)

    for length in (3, 60):
        call(2, length)
    assert len(op.plans._made) == 1
    call(4, 3)
    call(2, 3, torch.float16)
    call(2, 3, scale=0.5)
    call(2, 3, softcap=5.0)
    call(2, 3, mask=Causal())
    call(2, 3, sinks=torch.zeros(2, device=device))
    assert len(op.plans._made) == 7
