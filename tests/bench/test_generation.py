"""The benchmark of generation: its rows, its table and its plot, and the contestants on a CPU with a tiny shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from attnzoo import bench
from attnzoo.bench import generation
from attnzoo.hf import generation_bench
from attnzoo.masks import SlidingWindow
from attnzoo.specs import GQA, MLA

ABOUT = {"device": "NVIDIA H200", "torch": "2.11", "packages": {"triton": "3.6"}, "commit": "0123456789abcdef"}
RESULT = ABOUT | {"limits": {"copy_gbs": 4000.0}}


def rows(batch: int) -> list[dict]:
    ours = {"side": "ours", "mechanism": "MHA", "batch": batch, "ms": 2.0, "generate_ms": 2.5, "bytes": 4_000_000_000}
    peer = {"side": "transformers", "mechanism": "MHA", "batch": batch, "generate_ms": 5.0}
    linear = {"side": "ours", "mechanism": "linear", "batch": batch, "unavailable": "OutOfMemoryError: too much"}
    return generation._with_predictions([ours, peer, linear], 4000.0)


def test_the_table_sets_bytes_beside_what_was_measured():
    text = generation.markdown(RESULT | {"rows": rows(16)})
    assert "| MHA | 16 | 4.00 | 16,000 | 8,000 | 0.50 | 6,400 | 3,200 | 2.00 |" in text
    assert "| linear | 16 | OutOfMemoryError: too much |" in text


def test_a_run_at_other_batches_keeps_the_rows_of_the_last(tmp_path: Path):
    path = tmp_path / "generation_h200.json"
    path.write_text(json.dumps(RESULT | {"rows": generation._merged(path, rows(1))}))
    again = generation._merged(path, rows(16))
    assert [row["batch"] for row in again if row["side"] == "transformers"] == [1, 16]
    assert len(generation._merged(path, rows(1))) == 3


def test_tables_and_plots_are_drawn_from_the_files_alone(tmp_path: Path):
    (tmp_path / "generation_h200.json").write_text(json.dumps(RESULT | {"rows": rows(1) + rows(16)}))
    assert bench.main(["generation", "--draw", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "generation_h200.md").read_text().count("| MHA |") == 2
    assert (tmp_path / "generation_h200.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:save_pretrained of this model")
@pytest.mark.parametrize("mechanism", list(generation_bench.OURS))
def test_contestants_step_as_they_do_without_a_graph(monkeypatch, tmp_path, mechanism):
    tiny = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    tiny |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    monkeypatch.setattr(generation_bench, "SHAPE", generation_bench.SHAPE | tiny)
    monkeypatch.setattr(generation_bench, "DEVICE", "cpu")
    monkeypatch.setattr(generation_bench, "STEPS", 2)
    step = generation_bench.Step
    monkeypatch.setattr(generation_bench, "Step", lambda *args, fuse=False, **options: step(*args, **options))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    small = {"MLA": MLA(kv_lora_rank=32), "window 1k": GQA(mask=SlidingWindow(16))}
    if mechanism in small:
        kind = generation_bench.OURS[mechanism][1]
        monkeypatch.setitem(generation_bench.OURS, mechanism, (small[mechanism], kind))
    lock = generation_bench._Lock(tmp_path / "lock")
    row = generation_bench.ours(generation_bench._model("ours", mechanism), mechanism, 2, 64, lock)
    lock.file.close()
    assert row["error"] < 0.01
    assert row["ms"] > 0
    assert row["generate_ms"] > 0
