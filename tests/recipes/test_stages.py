"""Stages of a run: how long, what trains, and that a run stopped in any of them goes on as if it had not been."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from recipes.length import divide
from recipes.module import Uptraining
from recipes.objectives import Objective
from recipes.run_folder import RunFolder
from recipes.stages import plan_stages, stage_at
from recipes.uptrain import uptrain
from tests.support.processes import as_torchrun
from tests.support.recipes import Tiny
from tests.support.tiny_llama import save_tiny_llama

OPTIMIZER = {
    "method": "adamw",
    "lr": 1.0,
    "betas": [0.9, 0.95],
    "eps": 1e-8,
    "weight_decay": 0.1,
    "schedule": "linear",
    "warmup": 0.5,
    "final": 0.0,
}
CONFIG = {"stages": None, "objective": {"ce": {}}, "train": "all", "optimizer": OPTIMIZER}
STAGES = (
    "stages={transfer: {max_steps: 2, objective: {layers: {}}, train: attention, optimizer: {lr: 0.003}}, "
    "distil: {max_steps: 3, objective: {kl: {weight: {from: 1.0, to: 0.5}}, ce: {weight: {from: 0.0, to: 0.5}}}}, "
    "finish: {objective: {ce: {}}, train: [model.norm.weight, '*.mlp.*']}}"
)
LONG = [STAGES, "max_steps=7", "validation.every_n_steps=4", "checkpoint.every_n_steps=null", "batch.accumulate=2"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Tiny(tmp_path_factory.mktemp("tiny"), dropout=0.1)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run that nothing interrupted."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "run")
    uptrain(tiny.config(*LONG), run)
    return run


def plan(stages, steps, **config):
    return plan_stages({**CONFIG, **config, "stages": stages}, steps=steps, tokens_per_step=100)


@pytest.mark.parametrize(
    ("stages", "steps", "lengths"),
    [
        ({"a": {"share": 0.2}, "b": {}}, 10, {"a": 2, "b": 8}),
        ({"a": {"share": 0.33}, "b": {"share": 0.33}, "c": {"share": 0.34}}, 10, {"a": 3, "b": 4, "c": 3}),
        ({"a": {"max_steps": 3}, "b": {"max_tokens": 150}}, None, {"a": 3, "b": 2}),
        ({"a": {}, "b": {"max_tokens": 250}}, 7, {"a": 4, "b": 3}),
        ({"a": {"share": 0.01}, "b": {}}, 10, {"b": 10}),
        ({"a": {}}, 0, {"a": 0}),
    ],
)
def test_a_stage_has_its_share_its_steps_its_tokens_or_the_rest(stages, steps, lengths):
    assert divide(stages, steps=steps, tokens_per_step=100) == lengths


@pytest.mark.parametrize(
    ("stages", "steps", "message"),
    [
        ({"a": {"share": 0.2, "max_steps": 3}}, 10, "stages.a must have one of share, max_steps and max_tokens"),
        ({"a": {"share": 0.2}}, None, "stages.a.share is a part of the run: give its alpha"),
        ({"a": {"share": 1.2}}, 10, "stages.a.share must be a part of the run"),
        ({"a": {}, "b": {}}, 10, "stages.b has no share, max_steps or max_tokens"),
        ({"a": {}}, None, "stages.a has no share"),
        ({"a": {"max_steps": 3}}, 10, "the stages have 3 steps together, and the run has 10"),
        ({"a": {"max_steps": 30}, "b": {}}, 10, "the stages have 30 steps together"),
    ],
)
def test_lengths_of_stages_that_do_not_fit_the_run_are_refused(stages, steps, message):
    with pytest.raises(ValueError, match=message):
        divide(stages, steps=steps, tokens_per_step=100)


def test_a_stage_takes_from_the_run_what_it_leaves_out_and_has_a_schedule_of_its_own():
    first, second = plan({"a": {"max_steps": 4, "optimizer": {"lr": 0.5}}, "b": {"objective": {"kl": {}}}}, 10)
    assert (first.first, first.end, second.first, second.end) == (0, 4, 4, 10)
    assert [first.learning_rate(step) for step in range(4)] == [0.25, 0.5, 0.5, 0.25]
    assert second.learning_rate(4) == pytest.approx(1 / 3)
    assert [term.name for term in (*first.terms, *second.terms)] == ["ce", "kl"]
    assert [first.needs_teacher, second.needs_teacher] == [False, True]
    assert [second.progress(step) for step in (4, 9)] == [0, 1]
    assert [stage_at([first, second], step) for step in (0, 3, 4, 10)] == [0, 0, 1, 1]
    assert [stage.name for stage in plan(None, 3)] == ["uptraining"]
    with pytest.raises(ValueError, match=r"stages\.a\.seq_len is no field of a stage"):
        plan({"a": {"seq_len": 3}}, 10)


def test_each_stage_trains_its_own_parameters_with_a_new_optimizer(tiny, tmp_path, monkeypatch):
    before = []

    def watched(self, model, *rest, original=Objective.__call__):
        if model.training:
            trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            before.append((trains, {name: weight.clone() for name, weight in model.state_dict().items()}))
        return original(self, model, *rest)

    monkeypatch.setattr(Objective, "__call__", watched)
    model, curve = tiny.train(tmp_path / "run", *LONG, "batch.accumulate=1")
    steps = [*before, (None, model.state_dict())]
    inside = (".self_attn.", "", ".mlp.")
    for number, part in ((0, 0), (2, 1), (5, 2)):
        for name, weight in steps[number][1].items():
            trains = inside[part] in name or (part == 2 and name == "model.norm.weight")
            assert torch.equal(weight, steps[number + 1][1][name]) == (not trains), (number, name)
            assert (name in steps[number][0]) == trains
    assert [point["stage"] for point in curve] == ["transfer", "transfer", "distil", "distil", "finish"]
    assert [point["step"] for point in curve] == [0, 2, 4, 5, 7]


@pytest.mark.parametrize("step", [1, 2, 6])
def test_a_run_that_was_stopped_in_any_stage_goes_on_exactly(tiny, finished, tmp_path, monkeypatch, step):
    """In the first stage, at its end, and in the last."""
    run = RunFolder(tmp_path / "run")

    def stopped(self, window, index, original=Uptraining.training_step):
        original(self, window, index)
        if self.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Uptraining, "training_step", stopped)
        with pytest.raises(SystemExit):
            uptrain(tiny.config(*LONG), run)
    assert [path.name for path in run.checkpoints.iterdir()] == [f"step_{step:08d}"]
    uptrain(tiny.config(*LONG, f"resume={run.path}"), run)
    ours, theirs = (load_file(one.uptrained / "model.safetensors") for one in (run, finished))
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name
    curves = [json.loads((one.path / "report.json").read_text())["curve"] for one in (run, finished)]
    assert curves[0] == curves[1]


def test_transfer_alone_brings_the_layers_nearer_to_the_teachers(tiny, tmp_path, monkeypatch):
    errors = []

    def watched(self, model, *rest, original=Objective.__call__):
        loss = original(self, model, *rest)
        errors.extend([float(loss.terms["layers"])] if "layers" in loss.terms else [])
        return loss

    monkeypatch.setattr(Objective, "__call__", watched)
    run = RunFolder(tmp_path / "run")
    uptrain(
        tiny.config(
            *("objective=layers", "max_steps=16", "optimizer.lr=0.003", "optimizer.weight_decay=0", "batch.size=64")
        ),
        run,
    )
    assert sum(errors[-4:]) < 0.8 * sum(errors[:4])


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("[nothing.*]", "has the pattern 'nothing.*', which no parameter's name matches"),
        ("lora", "train='lora' leaves no parameter of the model to train"),
        ("heads", "train must be one of all, layers, attention, lora or a list of patterns, got 'heads'"),
    ],
)
def test_a_part_that_is_none_of_the_model_is_refused(tiny, tmp_path, train, message):
    with pytest.raises(ValueError, match=message):
        tiny.train(tmp_path / "run", f"train={train}")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_go_through_the_stages_as_one(tiny, tmp_path, strategy):
    model = save_tiny_llama(tmp_path / "model")  # without dropout, whose random numbers would be others
    common = [STAGES, "batch.size=1", "batch.seq_len=32", "max_steps=7", "optimizer.eps=1e-3", f"model.path={model}"]
    split = ["hydra.run.dir=two", f"trainer.strategy={strategy}", "batch.accumulate=2"]
    done = as_torchrun(tmp_path, *tiny.overrides, *common, *split)
    assert all(code == 0 for code, _ in done), done
    uptrain(tiny.config(*common, "batch.accumulate=4"), RunFolder(tmp_path / "one"))
    one, two = (json.loads((tmp_path / name / "report.json").read_text())["curve"] for name in ("one", "two"))
    assert [point["stage"] for point in two] == [point["stage"] for point in one]
    for point, other in zip(one, two, strict=True):
        assert other["cross_entropy"] == pytest.approx(point["cross_entropy"], abs=1e-5)
