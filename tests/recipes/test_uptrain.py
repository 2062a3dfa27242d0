"""The main job from end to end: what it leaves behind, how it goes on after a kill, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from recipes.models import load_model, load_tokenizer
from recipes.module import NotFinite
from recipes.objectives import Objective
from recipes.run_folder import ResumeMismatch, RunFolder
from recipes.uptrain import open_data, uptrain
from recipes.windows import Windows
from tests.support.processes import python
from tests.support.recipes import Tiny
from tests.support.tiny_llama import save_tiny_llama

REPOSITORY = Path(__file__).parents[2]

# Steps of two micro-batches, and of one at the end of each epoch; checkpoints after steps 2, 4 and 6.
LONG = ["max_steps=6", "batch.accumulate=2", "validation.every_n_steps=4", "checkpoint.every_n_steps=2"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Tiny(tmp_path_factory.mktemp("tiny"), dropout=0.1)  # dropout, so that random numbers matter


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run that nothing interrupted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the process that is killed
    run = RunFolder(tmp_path_factory.mktemp("runs") / "run")
    uptrain(tiny.config(*LONG, "logger=csv_tensorboard"), run)
    yield run
    torch.set_num_threads(threads)


def micro_batches(tiny, steps):
    """How many micro-batches the first steps of a LONG run take; the ends of epochs cut windows short."""
    config = tiny.config(*LONG)
    data = open_data(config, load_tokenizer(config.model), tiny.model)
    return sum(map(len, Windows(data.train_loader(), steps=steps, accumulate=config.batch.accumulate)))


def outcome(run):
    report = json.loads((run.path / "report.json").read_text())
    return load_file(run.uptrained / "model.safetensors"), report["curve"]


def assert_same_outcome(run, other):
    (weights, curve), (other_weights, other_curve) = outcome(run), outcome(other)
    assert curve == other_curve
    assert weights.keys() == other_weights.keys()
    for name in weights:
        assert torch.equal(weights[name], other_weights[name]), name


def test_a_run_leaves_its_config_its_sources_its_logs_and_its_report(tiny, finished):
    config = OmegaConf.load(finished.config)
    assert config.optimizer.lr == 0.01 and config.attention.num_kv_heads == 1
    session = json.loads((finished.path / "run.json").read_text())["sessions"][0]
    assert session["seeds"] == {"everything": 0, "convert": 0}
    assert session["versions"]["torch"] == torch.__version__
    assert session["git_commit"]
    report = json.loads((finished.path / "report.json").read_text())
    assert [row["name"] for row in report["evaluations"]] == ["original", "converted", "uptrained"]
    original, converted, uptrained = report["evaluations"]
    assert original["kv_bytes_per_token"] == 2 * converted["kv_bytes_per_token"]
    assert uptrained["cross_entropy"] < converted["cross_entropy"]
    assert [point["step"] for point in report["curve"]] == [0, 4, 6]
    assert report["curve"][0]["tokens"] == 0 < report["curve"][1]["tokens"] < report["curve"][2]["tokens"]
    assert [path.name for path in finished.checkpoints.iterdir()] == ["step_00000006"]
    assert list(finished.logs.glob("tensorboard/*/events*"))
    header = (finished.logs / "csv/from_step_0/metrics.csv").read_text().splitlines()[0]
    assert {"train/loss", "train/tokens_per_s", "train/lr", "val/cross_entropy"} <= set(header.split(","))
    assert not list(finished.path.rglob(".*"))


def test_the_exported_folder_loads_and_generates_where_attnzoo_is_not_installed(tiny, finished, tmp_path):
    trained = load_model({**tiny.config().model, "path": str(finished.converted)})
    weights = load_file(finished.checkpoints / "step_00000006" / "tensors.safetensors")
    prefix = "/state_dict/model."
    trained.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    tokens = torch.randint(0, 62, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.save({"tokens": tokens, "logits": trained.eval()(tokens).logits}, tmp_path / "expected.pt")
    script = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("attnzoo", "recipes"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
model = AutoModelForCausalLM.from_pretrained({str(finished.uptrained)!r})
assert model.config.num_key_value_heads == 1 and model.dtype == torch.float32
difference = (model(expected["tokens"]).logits - expected["logits"]).abs().max().item()
assert difference <= 1e-5, difference
tokenizer = AutoTokenizer.from_pretrained({str(finished.uptrained)!r})
prompt = tokenizer("w1 w7", return_tensors="pt", return_token_type_ids=False)
assert model.generate(**prompt, max_new_tokens=4, min_new_tokens=4).shape == (1, 6)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("moment", ["backward", "save"])
def test_a_run_killed_and_resumed_gives_the_same_weights_as_one_that_never_stopped(tiny, finished, tmp_path, moment):
    """Killed after the first micro-batch of step 5, or while the checkpoint of step 4 is being written."""
    config, run = tmp_path / "config.yaml", RunFolder(tmp_path / "run")
    before = micro_batches(tiny, steps=4)
    assert micro_batches(tiny, steps=5) >= before + 2, "step 5 is to be killed between two micro-batches"
    OmegaConf.save(tiny.config(*LONG), config)
    script = f"""
import os, signal
from omegaconf import OmegaConf
from pathlib import Path
import recipes.checkpoint_files as files, recipes.objectives as objectives
from recipes.run_folder import RunFolder
from recipes.uptrain import uptrain

def killing(function, at, counts=lambda *_: True):
    calls = []
    def called(*args):
        calls.append(counts(*args))
        if sum(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return called

if {moment!r} == "backward":
    in_training = lambda objective, model, *_: model.training
    objectives.Objective.__call__ = killing(objectives.Objective.__call__, {before + 2}, in_training)
else:
    files.to_disk = killing(files.to_disk, 7)  # the second file of the second checkpoint
uptrain(OmegaConf.load({str(config)!r}), RunFolder(Path({str(run.path)!r})))
"""
    killed = python(script, tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    last = {"backward": "step_00000004", "save": "step_00000002"}[moment]
    assert [path.name for path in run.checkpoints.glob("step_*")] == [last]
    assert not run.uptrained.exists()
    uptrain(tiny.config(*LONG, "resume=auto"), run)
    assert_same_outcome(run, finished)
    assert len(json.loads((run.path / "run.json").read_text())["sessions"]) == 2
    assert not list(run.path.rglob(".*"))


def test_ctrl_c_saves_and_the_run_goes_on_from_there(tiny, finished, tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    before_step_3 = micro_batches(tiny, steps=2)
    before = signal.getsignal(signal.SIGINT)
    calls = []

    def interrupted(self, model, *batch, original=Objective.__call__):
        calls.append(model.training)
        if model.training and sum(calls) == before_step_3 + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, model, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "__call__", interrupted)
        with pytest.raises(SystemExit) as exited:
            uptrain(tiny.config(*LONG, "checkpoint.every_n_steps=null"), run)
    assert exited.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_00000003"]
    uptrain(tiny.config(*LONG, f"resume={run.path}"), run)
    assert_same_outcome(run, finished)


def test_a_resume_with_another_config_lists_the_keys_that_differ(tiny, finished):
    before = sorted(finished.path.rglob("*"))
    with pytest.raises(ResumeMismatch) as refused:
        uptrain(tiny.config(*LONG, "resume=auto", "optimizer.lr=0.02", "seed=1", "logger=csv"), finished)
    listed = [line.strip() for line in str(refused.value).splitlines() if line.startswith("  ")]
    assert listed == [
        "convert.seed: 0 in the run, 1 now",
        "optimizer.lr: 0.01 in the run, 0.02 now",
        "seed: 0 in the run, 1 now",
    ]
    with pytest.raises(ValueError, match=r"holds a run already; resume=.* continues it"):
        uptrain(tiny.config(*LONG), finished)
    assert sorted(finished.path.rglob("*")) == before


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(tiny, tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    calls = []

    def diverging(self, model, *batch, original=Objective.__call__):
        calls.append(model.training)
        loss = original(self, model, *batch)
        return loss._replace(total=loss.total * (float("nan") if sum(calls) == 4 else 1))

    monkeypatch.setattr(Objective, "__call__", diverging)
    with pytest.raises(NotFinite, match=r"step 4: the loss is nan"):
        uptrain(tiny.config("max_steps=6", "checkpoint.every_n_steps=3"), run)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_00000003"]
    assert all(
        weight.isfinite().all() for weight in load_file(run.checkpoints / "step_00000003/tensors.safetensors").values()
    )


def test_a_model_that_keeps_its_attention_is_not_converted_and_alpha_0_trains_nothing(tiny, tmp_path):
    run = RunFolder(tmp_path / "run")
    uptrain(
        tiny.config(
            "attention=original", "max_steps=null", "alpha=0", "model.original_tokens=1e9", "export_dtype=bfloat16"
        ),
        run,
    )
    assert list(run.evaluations) == ["original", "uptrained"] and not run.converted.exists()
    theirs = load_file(tiny.model / "model.safetensors")
    ours = load_file(run.uptrained / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name].bfloat16()) for name in ours)


def test_two_processes_train_as_one_with_twice_the_micro_batches(tiny, tmp_path):
    common = ["batch.size=1", "batch.seq_len=32", "max_steps=4", "optimizer.eps=1e-3"]
    no_dropout = f"model.path={save_tiny_llama(tmp_path / 'model')}"  # whose random numbers would be others
    command = [sys.executable, "-m", "attnzoo.cli", "uptrain", *tiny.overrides, *common, no_dropout]
    command += ["trainer.strategy=ddp", "trainer.devices=2", "batch.accumulate=2", "hydra.run.dir=two"]
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
    one, two = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "two")
    uptrain(tiny.config(*common, no_dropout, "batch.accumulate=4"), one)
    (weights, curve), (weights_of_two, curve_of_two) = outcome(one), outcome(two)
    for name, weight in weights.items():
        torch.testing.assert_close(weights_of_two[name], weight, atol=2e-6, rtol=1e-5, msg=name)
    assert [point["tokens"] for point in curve] == [point["tokens"] for point in curve_of_two]
    assert curve_of_two[-1]["cross_entropy"] == pytest.approx(curve[-1]["cross_entropy"], abs=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "one", "two"]
