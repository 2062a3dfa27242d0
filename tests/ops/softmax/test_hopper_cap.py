"""The polynomials that stand for tanh in the Hopper forward kernel, which only a Hopper GPU can run."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("name", ["SHORT", "LONG"])
def test_they_are_closer_to_tanh_than_the_unit_that_they_stand_for(name: str) -> None:
    from attnzoo.ops.softmax.triton import hopper_cap

    end = hopper_cap.NEAR if name == "SHORT" else hopper_cap.FAR
    x = np.linspace(1e-6, end, 100_001, dtype=np.float32)
    found = np.zeros_like(x)
    for factor in reversed(getattr(hopper_cap, name)):
        found = found * (x * x) + np.float32(factor)
    assert np.abs(found * x / np.tanh(x.astype(np.float64)) - 1).max() < 2**-11


def test_every_score_is_written_on_all_ways_and_from_its_own_product() -> None:
    from attnzoo.ops.softmax.triton.hopper_cap import ASSEMBLY, PLACES, TOGETHER

    near, rest = ASSEMBLY.value.split("MIDDLE:")
    middle, far = rest.split("FAR:")
    results, products = ([f"${first + n}" for n in range(TOGETHER)] for first in (0, TOGETHER))
    for way in (near, middle):
        found = re.findall(r"mul\.f32 (\$\d+), y, (\$\d+);", way)
        assert [pair[0] for pair in found] == results and [pair[1] for pair in found] == products
        assert "tanh" not in way and way.rstrip().endswith("bra DONE;")
    assert re.findall(r"mul\.f32 (\$\d+), x, \$\d+;", far) == results
    assert far.count("tanh.approx.f32") == TOGETHER
    assert len(PLACES.value.split(",")) == 4 * TOGETHER
