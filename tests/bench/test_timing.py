"""Timing in turns, with a clock that a test can tell the time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attnzoo.bench import timing


class Device:
    """Functions that take as long as they say, on a device that is slower after hungry ones."""

    def __init__(self) -> None:
        self.heat = 0.0
        self.ran: list[str] = []

    def function(self, name: str, length: float, hunger: float) -> Callable[[], float]:
        def run() -> float:
            self.ran.append(name)
            milliseconds = length * (1 + self.heat)
            self.heat = hunger
            return milliseconds

        return run

    @staticmethod
    def clock(function: Callable[[], float]) -> Callable[[], float]:
        milliseconds = function()
        return lambda: milliseconds


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM", 0.0)
    monkeypatch.setattr(timing, "SECONDS", 0.0)


def test_equal_functions_come_out_equal_whoever_their_neighbours_are(quick, monkeypatch) -> None:
    monkeypatch.setattr(timing, "TURNS", 400)
    device = Device()
    functions = [device.function("frugal", 3.0, 0.0), device.function("first", 1.0, 0.1)]
    functions += [device.function("hungry", 2.0, 0.3), device.function("second", 1.0, 0.1)]
    taken = timing.in_turns(functions, device.clock)
    means = [sum(each) / len(each) for each in taken]
    assert means[1] == pytest.approx(means[3], rel=0.02)
    assert means[0] == pytest.approx(3 * means[1], rel=0.1)


def test_every_function_has_one_time_a_turn_and_the_first_turns_do_not_count(quick) -> None:
    device = Device()
    taken = timing.in_turns([device.function(name, 1.0, 0.0) for name in "abc"], device.clock)
    assert [len(each) for each in taken] == [timing.TURNS] * 3
    turns = ["".join(device.ran[at : at + 3]) for at in range(0, len(device.ran), 3)]
    assert len(turns) == timing.TURNS + 1
    assert all(sorted(turn) == list("abc") for turn in turns) and len(set(turns)) > 3


def test_short_functions_get_more_turns_but_not_for_ever(quick, monkeypatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 60.0)
    taken = timing.in_turns([lambda: 1.0], Device.clock)
    assert len(taken[0]) == timing.MOST
    assert timing.in_turns([], Device.clock) == []


def test_the_spread_is_that_of_the_middle_half_over_the_median() -> None:
    assert timing.spread([1.0, 9.0, 2.0, 2.2, 1.8, 2.0, 2.0, 0.1]) == pytest.approx(0.1)
    assert timing.spread([3.0]) == 0
