"""Specs: values, round trips and refusals."""

from __future__ import annotations

import pytest
import yaml

from attnzoo.masks import Causal, Documents, SlidingWindow
from attnzoo.specs import GQA, spec_from_dict


@pytest.mark.parametrize(
    "spec", [GQA(), GQA(num_kv_heads=8), GQA(mask=SlidingWindow(4) | Documents([0, 2]) & Causal())]
)
def test_spec_survives_a_round_trip_through_yaml(spec: GQA) -> None:
    assert spec_from_dict(yaml.safe_load(yaml.safe_dump(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GQA(num_kv_heads=0), "num_kv_heads must be a positive integer or None, got 0"),
        (lambda: GQA(num_kv_heads=True), "num_kv_heads must be"),
        (lambda: GQA(mask="causal"), "mask must be one of attnzoo.masks or None, got 'causal'"),
        (lambda: spec_from_dict({"mechanism": "mqa"}), "mechanism must be one of"),
        (lambda: spec_from_dict({"num_kv_heads": 2}), "mechanism must be one of .* got None"),
        (
            lambda: spec_from_dict({"mechanism": "gqa", "heads": 2}),
            r"takes \['mask', 'num_kv_heads'\], got \['heads'\]",
        ),
    ],
)
def test_bad_specs_are_refused_by_name(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
