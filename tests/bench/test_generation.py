"""The benchmark of generation: its rows, its table and its plot, and the contestants on a CPU with a tiny shape."""

from __future__ import annotations

import json
import threading
import time
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
    return [generation.with_predictions(row, 4000.0) for row in (*(peer | one for one in peers), ours, linear)]


def test_the_table_sets_bytes_and_the_fastest_peer_beside_what_was_measured():
    text = generation.markdown(RESULT | {"rows": rows(16)})
    assert "| MHA | 16 | 4.00 | 16,000 | 8,000 | 0.50 | 6,400 | 3,200 | static | 2.50 | 2.00 |" in text
    assert "| linear | 16 | OutOfMemoryError: too much |" in text


def test_a_run_keeps_the_rows_of_other_batches_and_mechanisms():
    again = generation.merged(rows(1), [{"side": "ours", "mechanism": "MHA", "batch": 16}])
    assert [(row["mechanism"], row["batch"]) for row in again if row["side"] == "ours"] == [
        ("MHA", 1),
        ("MHA", 16),
        ("linear", 1),
    ]
    assert len(generation.merged(rows(1), rows(1))) == len(rows(1))


def test_processes_run_side_by_side_as_far_as_memory_goes(monkeypatch, tmp_path: Path):
    running, most = [0.0], [0.0]
    change = threading.Lock()

    class Process:
        returncode = 0

        def __init__(self, command: list[str], **options: object) -> None:
            self.row = {"side": "ours", "mechanism": command[5], "batch": int(command[7]), "ms": 1.0}
            self.size = generation.needs(command[5], int(command[7]), 8192)

        def __enter__(self):
            with change:
                running[0] += self.size
                most[0] = max(most[0], running[0])
            return self

        def __exit__(self, *error: object) -> None:
            with change:
                running[0] -= self.size

        @property
        def stdout(self) -> Iterator[str]:
            time.sleep(0.02)
            yield "a warning\n"
            yield json.dumps(self.row) + "\n"

    monkeypatch.setattr(generation.subprocess, "Popen", Process)
    monkeypatch.setattr("attnzoo.bench.running.machine", lambda commit: dict(ABOUT))
    monkeypatch.setattr("attnzoo.bench.running.limits", lambda: {"copy_gbs": 4000.0})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (120e9, 150e9))
    monkeypatch.setattr(generation, "draw", lambda out: None)
    cases = [(name, batch) for name in generation.MECHANISMS for batch in (1, 64)]
    assert generation.run(cases, tmp_path, 9, 8192, "c") == 0
    assert 80 < most[0] <= 0.95 * 120
    found = json.loads((tmp_path / "generation_h200.json").read_text())["rows"]
    assert {(row["mechanism"], row["batch"]) for row in found} == set(cases)


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
    row = contestants.ours(mechanism, 2, 64, tiny)
    assert row["error"] < 0.01
    assert row["ms"] > 0
    assert row["generate_ms"] > 0


@pytest.mark.parametrize("mechanism", list(peers.PEERS))
def test_transformers_decodes_over_as_many_tokens_as_ours(monkeypatch, tiny, mechanism):
    kind, changes = peers.PEERS[mechanism]
    if "sliding_window" in changes:
        monkeypatch.setitem(peers.PEERS, mechanism, (kind, changes | {"sliding_window": 16}))
    how = peers.ways(mechanism, 1)[0]
    for layer in peers.filled(peers.peer_model(mechanism, how), 2, 64).layers:
        assert int(layer.get_seq_length()) == 64
        assert layer.keys[:, :, : 16 if "sliding_window" in changes else 64].ne(0).all()
    assert peers.theirs(mechanism, how, 2, 64, tiny)["generate_ms"] > 0


def test_memory_goes_to_the_largest_that_fits():
    room = generation.Room(100.0)
    got: list[float] = []

    def take(size: float) -> None:
        with room.of(size):
            got.append(size)
            time.sleep(0.01)

    with room.of(100.0):
        threads = [threading.Thread(target=take, args=(size,)) for size in (5.0, 70.0, 40.0)]
        for thread in threads:
            thread.start()
        while len(room.waiting) < 3:
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert got == [70.0, 5.0, 40.0]
    assert room.free == 100.0
