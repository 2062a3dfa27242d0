"""Launches that are taken down and made again, with a stand-in for what launches a compiled kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnzoo.ops.launcher import Recording


class Descriptor(NamedTuple):
    base: Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]


def drawn(count: int) -> list[Tensor]:
    return [torch.randn(8, 8) for _ in range(count)]


def test_a_launch_is_made_again_for_other_tensors_with_the_same_numbers() -> None:
    made: list[tuple[Any, ...]] = []
    x, out = drawn(2)
    recording = Recording([x, None, out])
    recording.add(
        lambda *arguments: made.append(arguments), [out, 3, Descriptor(x, [8, 8], [8, 1], [4, 4]), None, True]
    )
    other, result = drawn(2)
    assert recording.replay([other, None, result])
    (pointer, number, tiles, absent, constant) = made[0]
    assert pointer is result and tiles.base is other and (number, absent, constant) == (3, None, True)
    assert (tiles.shape, tiles.strides, tiles.block_shape, tiles.padding) == ([8, 8], [8, 1], [4, 4], "zero")


def test_all_launches_of_a_call_are_made_in_their_order() -> None:
    made: list[int] = []
    x = drawn(1)
    recording = Recording(x)
    for number in range(3):
        recording.add(lambda _, number: made.append(number), [x[0], number])
    assert recording.replay(drawn(1)) and made == [0, 1, 2]


def test_what_cannot_be_made_again_is_not() -> None:
    (x, foreign) = drawn(2)
    with_another = Recording([x])
    with_another.add(lambda *_: None, [x, foreign])
    interpreted = Recording([x])
    interpreted.add(None, [x])
    for recording in (with_another, interpreted):
        assert not recording.replay(drawn(1))


def test_an_address_that_kernels_were_not_compiled_for_is_refused() -> None:
    made: list[object] = []
    (x,) = drawn(1)
    recording = Recording([x])
    recording.add(lambda *arguments: made.append(arguments), [x])
    shifted = torch.randn(65)[1:].view(8, 8)
    assert shifted.data_ptr() % 16 and not recording.replay([shifted]) and not made
    unaligned = Recording([shifted])
    unaligned.add(lambda *arguments: made.append(arguments), [shifted])
    assert not unaligned.replay([x])


def test_a_recording_keeps_no_tensor_alive() -> None:
    import weakref

    (x,) = drawn(1)
    recording = Recording([x])
    recording.add(lambda *_: None, [x, Descriptor(x, [8, 8], [8, 1], [4, 4])])
    gone = weakref.ref(x)
    del x
    assert gone() is None and recording is not None


def test_a_call_that_launched_nothing_is_not_made_again() -> None:
    (x,) = drawn(1)
    assert not Recording([x]).replay([x])
