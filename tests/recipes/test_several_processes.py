"""Runs of several processes: the same curve as one gives, through kills, resumes and another number of them."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from recipes import parallel
from recipes.run_folder import ResumeMismatch, RunFolder
from recipes.uptrain import main, uptrain
from tests.support.processes import as_srun, as_torchrun, torchrun
from tests.support.recipes import Tiny, run_command

pytestmark = pytest.mark.slow

# A larger eps keeps Adam from blowing rounding up where a gradient is next to nothing.
COMMON = ["batch.seq_len=32", "max_steps=6", "optimizer.eps=1e-3", "validation.every_n_steps=1"]
COMMON += ["checkpoint.every_n_steps=2", "validation.batches=3"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Tiny(tmp_path_factory.mktemp("tiny"))


def outcome(run: Path):
    curve = json.loads((run / "report.json").read_text())["curve"]
    return load_file(run / "uptrained" / "model.safetensors"), curve


def assert_close(run: Path, other: Path) -> None:
    (weights, curve), (other_weights, other_curve) = outcome(run), outcome(other)
    assert [(point["step"], point["tokens"]) for point in curve] == [(p["step"], p["tokens"]) for p in other_curve]
    for point, wanted in zip(curve, other_curve, strict=True):
        assert point["cross_entropy"] == pytest.approx(wanted["cross_entropy"], abs=2e-5), point
    for name, weight in other_weights.items():
        torch.testing.assert_close(weights[name], weight, atol=5e-6, rtol=1e-4, msg=name)


def test_shards_killed_and_resumed_on_as_many_or_fewer_processes_give_the_curve_of_one(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uptrain(tiny.config(*COMMON, "batch.accumulate=2"), RunFolder(tmp_path / "one"))
    sharded = [*tiny.overrides, *COMMON, "trainer.strategy=fsdp"]
    whole = torchrun(tmp_path, *sharded, "hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stderr
    assert_close(tmp_path / "whole", tmp_path / "one")

    killed = as_torchrun(tmp_path, *sharded, "hydra.run.dir=killed", step=3, number=signal.SIGKILL)
    assert all(code != 0 for code, _ in killed)
    [checkpoint] = (tmp_path / "killed/checkpoints").glob("step_*")
    assert checkpoint.name == "step_00000002"
    assert sorted(path.name for path in checkpoint.glob("tensors*")) == [
        "tensors_00000_of_00002.safetensors",
        "tensors_00001_of_00002.safetensors",
    ]
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    resumed = as_torchrun(tmp_path, "resume=killed")
    assert all(code == 0 for code, _ in resumed), resumed
    (weights, curve), (again, curve_again) = outcome(tmp_path / "whole"), outcome(tmp_path / "killed")
    assert curve == curve_again and all(torch.equal(again[name], weight) for name, weight in weights.items())

    run_command(monkeypatch, main, "resume=alone", "trainer.devices=1", "trainer.strategy=auto")
    assert_close(tmp_path / "alone", tmp_path / "one")
    assert (OmegaConf.load(tmp_path / "alone/config.yaml").batch.accumulate, len(list(tmp_path.iterdir()))) == (1, 4)


def test_a_stream_on_two_processes_stops_for_a_signal_to_one_of_them_and_goes_on_with_one(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stream = [*tiny.overrides, *COMMON, "data.streaming=true", "data.val_tokens=60", "name=streamed"]
    (code, said), (other_code, other_said) = as_srun(tmp_path, *stream, step=3, number=signal.SIGUSR1, ranks=(1,))
    assert (code, other_code) == (75, 75), said + other_said
    assert "stopped after step 3" in said and "recipes" not in other_said
    [run] = (tmp_path / "runs/streamed").iterdir()  # one folder, whatever the processes' clocks say
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000003"]
    run_command(monkeypatch, main, f"resume={run}", "trainer.devices=1")
    one = RunFolder(tmp_path / "one")
    uptrain(tiny.config(*stream[len(tiny.overrides) :], "data.lanes=2", "batch.accumulate=2"), one)
    assert_close(run, one.path)


@pytest.mark.parametrize("shared", ["true", "false"])
def test_a_teacher_may_be_shared_out_beside_the_student(tiny, tmp_path, shared):
    distil = [*COMMON, "max_steps=3", "objective=kl"]
    sharded = as_torchrun(
        tmp_path,
        *tiny.overrides,
        *distil,
        "trainer.strategy=fsdp",
        f"+trainer.shard_teacher={shared}",
        "hydra.run.dir=sharded",
    )
    assert all(code == 0 for code, _ in sharded), sharded
    uptrain(tiny.config(*distil, "batch.accumulate=2"), RunFolder(tmp_path / "one"))
    assert_close(tmp_path / "sharded", tmp_path / "one")


def test_another_number_of_processes_keeps_the_sequences_of_a_step_or_is_refused(tiny, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.start(tiny.config("batch.size=2", "batch.accumulate=3", "trainer.devices=4"), seeds={})
    fewer = run.continued(tiny.config("resume=auto", "trainer.devices=2"), ["resume=auto", "trainer.devices=2"])
    run.adapt(fewer)
    assert (fewer.trainer.devices, fewer.batch.accumulate) == (2, 6)
    run.start(fewer, seeds={})
    uneven = run.continued(tiny.config("resume=auto", "trainer.devices=5"), ["resume=auto", "trainer.devices=5"])
    with pytest.raises(ResumeMismatch, match=r"takes 24 sequences, which 5 processes .* must divide 12"):
        run.adapt(uneven)
    wrong = tiny.config("resume=auto", "batch.size=2", "trainer.devices=2", "batch.accumulate=4")
    with pytest.raises(ResumeMismatch, match=r"batch.accumulate: 3 in the run, 4 now"):
        run.start(wrong, seeds={})


@pytest.mark.parametrize(
    ("variables", "main", "devices", "nodes"),
    [
        ({}, True, 3, 1),
        ({"LOCAL_RANK": "1"}, False, 3, 1),  # of those that Lightning starts
        ({"RANK": "4", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, False, 4, 2),  # torchrun
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, True, 1, 1),
        ({"SLURM_PROCID": "8", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16", "SLURM_NNODES": "2"}, False, 8, 2),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16", "SLURM_NNODES": "2"}, True, 8, 2),
    ],
)
def test_one_process_of_all_nodes_is_the_main_one(monkeypatch, variables, main, devices, nodes):
    if "RANK" in variables:
        variables |= {"TORCHELASTIC_RUN_ID": "x"}
    if "SLURM_NTASKS" in variables:
        variables |= {"SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NAME": "train"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    trainer = OmegaConf.create({"devices": 3, "num_nodes": 1})
    parallel.follow_launcher(trainer)
    assert parallel.is_main_process() == main
    assert (trainer.devices, trainer.num_nodes, parallel.world_size(trainer)) == (devices, nodes, devices * nodes)


def test_several_nodes_need_something_that_starts_their_processes():
    with pytest.raises(ValueError, match=r"trainer.num_nodes is 2: start runs on several nodes with torchrun or srun"):
        parallel.follow_launcher(OmegaConf.create({"devices": 4, "num_nodes": 2}))
