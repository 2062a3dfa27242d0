"""`attnzoo uptrain` on the command line: run folders, multirun, and what it refuses."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from recipes.uptrain import main
from tests.support.recipes import Tiny, run_command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Tiny(tmp_path_factory.mktemp("tiny"))


def test_multirun_makes_a_folder_for_each_run(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_command(
        monkeypatch, main, "--multirun", *tiny.overrides, "max_steps=1", "attention=gqa", "attention.num_kv_heads=1,2"
    )
    folders = sorted(Path("runs/quick").glob("*/*/report.md"))
    assert [folder.parent.name for folder in folders] == ["0", "1"]
    kept = [OmegaConf.load(folder.parent / "config.yaml").attention.num_kv_heads for folder in folders]
    assert kept == [1, 2]


def test_multirun_on_several_devices_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--multirun runs on one device"):
        run_command(monkeypatch, main, "--multirun", *tiny.overrides, "trainer.devices=2", "seed=0,1")
    assert not list(tmp_path.rglob("config.yaml"))


def test_resume_alone_takes_the_config_of_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_command(monkeypatch, main, *tiny.overrides, "max_steps=1", "hydra.run.dir=mine")
    run_command(monkeypatch, main, "resume=mine")
    assert len(json.loads(Path("mine/run.json").read_text())["sessions"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["max_steps=null"], "exactly one of alpha, max_steps, max_tokens; got none"),
        (["alpha=0.1"], "got alpha=0.1, max_steps=4; set the others to null"),
        (["optimizer.rate=1"], "rate"),
        (["optimizer.schedule=step"], "optimizer.schedule must be one of cosine, linear, constant, got 'step'"),
        (["train=mlp"], "train must be one of all, .*patterns, got 'mlp'"),
        (["train=lora"], "train is lora, and lora is null"),
        (["lora={rank: 0}"], "lora.rank must be a whole number of at least 1, got 0"),
        (["+objective.mse.weight=1"], "objective.mse is no term of an objective; allowed are ce, kl, kl_topk, layers"),
        (["stages={a: {share: 2}}"], "stages.a.share must be a part of the run"),
        (["stages={a: {optimizer: {warmup: 2}}}"], "stages.a.optimizer.warmup must be a fraction"),
        (["untie_embeddings=true"], "untie_embeddings must be one of False, tie, keep, got True"),
        (["export_dtype=int8"], "export_dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["trainer.precision=16-true"], "trainer.precision must be one of"),
        (["trainer.compile=fast"], "trainer.compile must be one of auto, layers, model, off"),
        (["trainer.devices=auto"], "trainer.devices must be a number"),
        (["batch.accumulate=0"], "batch.accumulate must be a whole number of at least 1, got 0"),
        (["validation.batches=0.5"], "validation.batches must be a whole number of at least 1 or null, got 0.5"),
        (["checkpoint.every_n_minutes=0"], "checkpoint.every_n_minutes must be a number above 0 or null, got 0"),
        (["optimizer.warmup=50"], "optimizer.warmup must be a fraction between 0 and 1, got 50"),
        (["attention=gqa", "attention.num_kv_heads=3"], "num_kv_heads must divide"),
        (["resume=nowhere"], "resume=nowhere: there is no run in that folder"),
        (["data.path=EMPTY"], "EMPTY"),
        (["model.path=SMALL"], "64"),
    ],
)
def test_what_cannot_run_is_refused_and_leaves_nothing_behind(tiny, tmp_path, monkeypatch, overrides, message):
    monkeypatch.chdir(tmp_path)
    if "data.path=EMPTY" in overrides:
        Path("EMPTY").mkdir()
        Path("EMPTY/nothing.txt").write_text("  \n")
    if "model.path=SMALL" in overrides:
        Tiny(tmp_path / "elsewhere", vocab_size=40).model.rename("SMALL")  # its tokenizer has 62 tokens
        message = "40"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Exception, match=message):
        run_command(monkeypatch, main, *tiny.overrides, *overrides)
    assert sorted(tmp_path.rglob("*")) == before
