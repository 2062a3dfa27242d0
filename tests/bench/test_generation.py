"""The benchmark of generation: its rows, its table and its plot, and the contestants on a CPU with a tiny shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from attnzoo import bench
from attnzoo.bench import generation
from attnzoo.hf.generation import bench as contestants
from attnzoo.hf.generation import bench_common as common
from attnzoo.hf.generation import bench_peers as peers
from attnzoo.masks import SlidingWindow
from attnzoo.specs import GQA, MLA

ABOUT = {"device": "NVIDIA H200", "torch": "2.11", "packages": {"triton": "3.6"}, "commit": "0123456789abcdef"}
RESULT = ABOUT | {"limits": {"copy_gbs": 4000.0}}


def rows(batch: int) -> list[dict]:
    ours = {"side": "ours", "mechanism": "MHA", "batch": batch, "ms": 2.0, "generate_ms": 2.5, "bytes": 4_000_000_000}
    peer = {"side": "transformers", "mechanism": "MHA", "batch": batch}
    peers = [{"how": "static", "generate_ms": 5.0}, {"how": "dynamic", "generate_ms": 9.0}, {"how": "flex"}]
    linear = {"side": "ours", "mechanism": "linear", "batch": batch, "unavailable": "OutOfMemoryError: too much"}
    return generation._with_predictions([*(peer | one for one in peers), ours, linear], 4000.0)


def test_the_table_sets_bytes_and_the_fastest_peer_beside_what_was_measured():
    text = generation.markdown(RESULT | {"rows": rows(16)})
    assert "| MHA | 16 | 4.00 | 16,000 | 8,000 | 0.50 | 6,400 | 3,200 | static | 2.00 |" in text
    assert "| linear | 16 | OutOfMemoryError: too much |" in text


def test_a_run_keeps_the_rows_of_other_batches_and_mechanisms(tmp_path: Path):
    path = tmp_path / "generation_h200.json"
    path.write_text(json.dumps(RESULT | {"rows": generation.merged(path, rows(1))}))
    again = generation.merged(path, [{"side": "ours", "mechanism": "MHA", "batch": 16}])
    assert [(row["mechanism"], row["batch"]) for row in again if row["side"] == "ours"] == [
        ("MHA", 1),
        ("MHA", 16),
        ("linear", 1),
    ]
    assert len(generation.merged(path, rows(1))) == len(rows(1))


def test_tables_and_plots_are_drawn_from_the_files_alone(tmp_path: Path):
    (tmp_path / "generation_h200.json").write_text(json.dumps(RESULT | {"rows": rows(1) + rows(16)}))
    assert bench.main(["generation", "--draw", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "generation_h200.md").read_text().count("| MHA |") == 2
    assert (tmp_path / "generation_h200.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def tiny(monkeypatch, tmp_path: Path) -> Iterator[common.Lock]:
    """The benchmark on a CPU, with a model and counts that are small."""
    shape = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    monkeypatch.setattr(common, "SHAPE", common.SHAPE | shape)
    monkeypatch.setattr(common, "DEVICE", "cpu")
    monkeypatch.setattr(common, "STEPS", 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    lock = common.Lock(tmp_path / "lock")
    yield lock
    lock.file.close()


@pytest.mark.filterwarnings("ignore:save_pretrained of this model")
@pytest.mark.parametrize("mechanism", list(contestants.OURS))
def test_ours_steps_as_it_does_without_a_graph(monkeypatch, tiny, mechanism):
    step = contestants.Step
    monkeypatch.setattr(contestants, "Step", lambda *args, fuse=False, **options: step(*args, **options))
    small = {"MLA": MLA(kv_lora_rank=32), "window 1k": GQA(mask=SlidingWindow(16))}
    if mechanism in small:
        kind = contestants.OURS[mechanism][1]
        monkeypatch.setitem(contestants.OURS, mechanism, (small[mechanism], kind))
    row = contestants.ours(contestants.our_model(mechanism), mechanism, 2, 64, tiny)
    assert row["error"] < 0.01
    assert row["ms"] > 0
    assert row["generate_ms"] > 0


@pytest.mark.parametrize("how", ["sdpa, static cache, compiled", "sdpa, dynamic cache"])
@pytest.mark.parametrize("mechanism", list(peers.PEERS))
def test_transformers_decodes_over_as_many_tokens_as_ours(monkeypatch, tiny, mechanism, how):
    kind, changes = peers.PEERS[mechanism]
    if "sliding_window" in changes:
        monkeypatch.setitem(peers.PEERS, mechanism, (kind, changes | {"sliding_window": 16}))
    model = peers.peer_model(mechanism, how)
    cache = peers.filled(model, how, 2, 64)
    for layer in cache.layers:
        assert int(layer.get_seq_length()) == 64
        held = 64 if "sliding_window" not in changes else 15 + ("static" in how)
        assert layer.keys[:, :, :held].ne(0).all()
        assert layer.keys.shape[2] == held or "static" in how
    assert peers.theirs(model, how, 2, 64, tiny)["generate_ms"] > 0
