"""The polynomial that stands for tanh in the Hopper forward kernel, which only a Hopper GPU can run."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("triton")


def test_it_is_closer_to_tanh_than_the_unit_that_it_stands_for() -> None:
    from attnzoo.ops.softmax.triton.hopper_cap import NEAR, K

    x = np.linspace(1e-6, NEAR, 100_001, dtype=np.float32)
    square = x * x
    found = ((np.float32(K[2]) * square + np.float32(K[1])) * square + np.float32(K[0])) * x
    assert np.abs(found / np.tanh(x.astype(np.float64)) - 1).max() < 2**-11


@pytest.mark.parametrize("count", [32, 64])
def test_every_score_is_written_on_both_ways_and_from_its_own_product(count: int) -> None:
    from attnzoo.ops.softmax.triton import hopper_cap

    assembly, places = getattr(hopper_cap, f"BY_{count}").value, getattr(hopper_cap, f"PLACES_{count}").value
    near, far = assembly.split("FAR:")
    results = [f"${n}" for n in range(count)]
    pattern = r"mul\.f32 (\$\d+), (\w), (\$\d+);"
    assert [found[0] for found in re.findall(pattern, near)] == results
    assert [found[2] for found in re.findall(pattern, near)] == [f"${count + n}" for n in range(count)]
    assert [found[0] for found in re.findall(pattern, far) if found[1] == "x"] == results
    assert far.count("tanh.approx.f32") == count and "tanh" not in near
    assert len(places.split(",")) == 4 * count
