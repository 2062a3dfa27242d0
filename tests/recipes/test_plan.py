"""`attnzoo plan` on the command line."""

import json

import pytest

from attnzoo import cli
from recipes.plan import main, read_config
from tests.planning.configs import LLAMA_8B, LLAMA_405B
from tests.support.recipes import run_command


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(LLAMA_8B))
    return tmp_path


def test_plan_prints_a_table_and_writes_nothing_unless_told(folder, capsys, monkeypatch):
    run_command(monkeypatch, main, "model.path=model/config.json")
    printed = capsys.readouterr().out
    assert "llama: 8.03B parameters, 32 layers of 4096" in printed and "131,072" in printed
    assert max(map(len, printed.splitlines())) <= 100
    run_command(monkeypatch, main, "model.path=model", "out=new/plan")
    assert capsys.readouterr().out.startswith(printed)  # a folder is as good as the file, and what was written follows
    assert sorted(path.name for path in folder.iterdir()) == ["model", "new"]
    assert sorted(path.name for path in (folder / "new/plan").iterdir()) == ["plan.json", "plan.md"]
    record = json.loads((folder / "new/plan/plan.json").read_text())
    assert record["rows"][0]["kv_bytes_per_token"] == 131072 and record["gpu"]["memory_gb"] == 80
    assert "| as it is | 8.03B |" in (folder / "new/plan/plan.md").read_text()


def test_every_option_of_the_command_reaches_the_plan(folder, capsys, monkeypatch):
    options = ["gpu.memory_gb=100", "gpu.bandwidth_gbs=1000", "gpu.tflops=500", "gpu.sram_kb=100", "gpu.reserve=0.2"]
    options += ["gpu.count=2", "context=1000", "batch=3", "dtype=float32", "window=500", "global_tokens=7", "out=plan"]
    run_command(monkeypatch, main, "model.path=model", *options, "also=[{mechanism: gqa, num_kv_heads: 16}]")
    printed = capsys.readouterr().out
    for said in ("context 1,000, batch 3, float32", "2 GPU: 100 GB (20% kept)", "1000 GB/s, 500 TFLOP/s, 100 KiB"):
        assert said in printed
    record = json.loads((folder / "plan/plan.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert {"window 500", "sparse 500+7", "gqa num_kv_heads=16"} <= set(rows)
    own = rows["as it is"]
    assert own["kv_bytes"] == 1000 * own["kv_bytes_per_token"] == 1000 * 2 * 131072
    assert own["max_batch"] == (200e9 * 0.8 - own["weight_bytes"]) // own["kv_bytes"]


def test_a_model_that_no_gpu_holds_is_planned_all_the_same(folder, capsys):
    (folder / "large.json").write_text(json.dumps(LLAMA_405B))
    assert cli.main(["plan", "model.path=large.json"]) == 0
    assert "do not fit into 72 GB" in capsys.readouterr().out


def test_a_hub_id_is_read_by_transformers(monkeypatch):
    from transformers import AutoConfig, LlamaConfig

    asked = []

    def from_pretrained(name, trust_remote_code):
        asked.append((name, trust_remote_code))
        return LlamaConfig(num_hidden_layers=3)

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    config = read_config({"path": "someone/model", "trust_remote_code": False})
    assert config["num_hidden_layers"] == 3 and asked == [("someone/model", False)]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "model.path"),
        (["model.path=./nowhere"], "'./nowhere': there is no such file or folder"),
        (["model.path=empty"], "a folder without config.json"),
        (["model.path=broken.json"], "is not JSON"),
        (["model.path=list.json"], "a JSON object is needed"),
        (["model.path=other.json"], "'num_attention_heads', got None"),
        (["model.path=model", "gpu.memory_gb=0"], "gpu.memory_gb must be a number above 0, got 0"),
        (["model.path=model", "dtype=int3"], "dtype must be one of float32"),
        (["model.path=model", "also=[{mechanism: magic}]"], "mechanism must be one of"),
        (["model.path=model", "gpu.memory=80"], "gpu.memory"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_writes_nothing(folder, capsys, overrides, said):
    (folder / "empty").mkdir()
    for name, text in (("broken", "{"), ("list", "[]"), ("other", '{"model_type": "resnet"}')):
        (folder / f"{name}.json").write_text(text)
    before = sorted(folder.rglob("*"))
    assert cli.main(["plan", "out=plan", *overrides]) == 1
    shown = capsys.readouterr().err
    assert said in shown and "Traceback" not in shown
    assert sorted(folder.rglob("*")) == before
