"""The benchmark of training steps, on a tiny model."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/bench_training.py"
TINY = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 1e4},
}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("bench_training", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cases = {"tiny": {"rows": 2, "length": 24, "model": TINY}}
    cases["tiny-documents"] = cases["tiny"] | {"documents": 8}
    monkeypatch.setattr(module, "CASES", cases)
    monkeypatch.setattr(module, "TURNS", 2)
    monkeypatch.setattr(module, "TURN", 3)
    monkeypatch.setattr(module, "COMPARED", 4)
    return module


@pytest.mark.parametrize("case", ["tiny", "tiny-documents"])
def test_all_contestants_train_the_same_model_on_the_same_tokens(bench, case):
    names = ["eager", "sdpa", "attnzoo-rows", "attnzoo"]
    rows = list(bench.measurements([case], names, "off"))
    assert [row["name"] for row in rows] == names
    bench.require_agreement(rows)
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(2 * 24 / row["ms"] * 1e3) and row["ms"] > 0
        assert len(set(row["loss"])) == 4, "nothing was trained"


def test_a_contestant_that_computes_something_else_is_found(bench):
    rows = [{"case": "tiny", "name": name, "loss": [4.0], "gradient_norm": [1.0]} for name in ("eager", "other")]
    bench.require_agreement(rows)
    rows[1]["loss"] = [4.1]
    with pytest.raises(AssertionError, match=r"tiny other: loss 4.1 for 4.0 at step 1"):
        bench.require_agreement(rows)


def test_the_work_of_a_token_is_that_of_its_matmuls(bench):
    per_layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48
    attention = 2 * 2 * 32 * (24 + 1) / 2  # of queries with keys and of weights with values: 1 to 24 keys a query
    expected = 3 * (2 * (2 * per_layer + 64 * 32) + 2 * attention)
    assert bench.flops(bench.CASES["tiny"]) == expected
