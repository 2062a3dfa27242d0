"""Studies: which runs an experiment plans, who does them, and what is kept and drawn of them."""

from __future__ import annotations

import json
import time

import pytest
from filelock import FileLock
from matplotlib import image
from omegaconf import OmegaConf

from recipes import study_plan
from recipes.study import chosen
from recipes.study_draw import draw
from recipes.study_plan import Arm, arm_folder, plan_arms, read_study
from recipes.study_worker import DONE, FAILED, has_failed, work
from tests.support.processes import run_attnzoo
from tests.support.recipes import Tiny


@pytest.fixture
def experiment(monkeypatch):
    """Sets the `study` of experiment=quick."""
    plain = study_plan.composed

    def set_study(**study):
        def composed(overrides):
            config = plain(overrides)
            OmegaConf.set_struct(config, False)
            config.study = study
            return config

        monkeypatch.setattr(study_plan, "composed", composed)

    return set_study


def test_a_grid_gives_every_combination_and_its_first_axis_changes_fastest(experiment, tmp_path):
    grid = [{"mean": ["convert=mean"], "first": ["convert=first"]}, {"fast": ["optimizer.lr=1"], "slow": []}]
    experiment(arms={"control": ["attention=original"]}, grid=grid, each=["max_steps=2"], seeds=[0, 5])
    arms = plan_arms("quick", ["batch.size=3"], tmp_path)
    assert [(arm.name, arm.seed) for arm in arms] == [
        (name, seed)
        for name in ("control", "mean, fast", "first, fast", "mean, slow", "first, slow")
        for seed in (0, 5)
    ]
    fast = arms[5]
    assert fast.axes == ("first", "fast") and fast.config["seed"] == 5
    assert fast.config["convert"]["method"] == "first" and fast.config["optimizer"]["lr"] == 1
    assert fast.config["max_steps"] == 2 and arms[0].config["max_steps"] == 4  # `each` is of the grid alone
    assert all(arm.config["batch"]["size"] == 3 and "study" not in arm.config for arm in arms)
    assert len({arm.key for arm in arms}) == len(arms)


def test_equal_runs_of_two_studies_have_one_folder(experiment, tmp_path):
    experiment(arms={"one": ["convert=mean"], "two": ["optimizer.lr=1"]})
    first = plan_arms("quick", [], tmp_path)
    experiment(arms={"other": ["optimizer.lr=1"]}, grid=[{"a": ["convert=first"]}])
    second = plan_arms("quick", [], tmp_path)
    assert second[0].key == first[1].key and second[0].name == "other"
    assert first[0].key not in (second[0].key, second[1].key)


def test_an_arm_starts_from_the_model_of_another_one_with_its_seed(experiment, tmp_path):
    experiment(arms={"before": [], "after": ["model.path={arm:before}"]}, seeds=[0, 1])
    before, _, _, after = plan_arms("quick", [], tmp_path)
    assert before.needs == () and after.seed == 1
    other = next(arm for arm in plan_arms("quick", [], tmp_path) if arm.name == "before" and arm.seed == 1)
    assert after.needs == (other.key,)
    assert after.config["model"]["path"] == str(arm_folder(tmp_path, other.key) / "uptrained")
    assert [arm.name for arm in chosen(plan_arms("quick", [], tmp_path), ["after"])] == [
        "before",
        "before",
        "after",
        "after",
    ]


@pytest.mark.parametrize(
    "study, message",
    [
        ({}, "experiment=quick has no study"),
        ({"arms": {"a": []}, "seed": [0]}, "study.seed is no field"),
        ({"arms": {"a": []}, "figure": "pie"}, "study.figure is 'pie'"),
        ({"seeds": [0]}, "neither arms nor a grid"),
        ({"arms": {"a": ["model.path={arm:b}"], "b": []}}, "'a' needs 'b', which is no arm before it"),
    ],
)
def test_a_study_that_cannot_be_planned_is_refused(experiment, tmp_path, study, message):
    experiment(**study)
    with pytest.raises(ValueError, match=message):
        plan_arms("quick", [], tmp_path)


@pytest.mark.parametrize(("name", "runs"), [("recovery", 19), ("compare", 6)])
def test_every_study_of_conf_can_be_planned(name, runs, tmp_path):
    assert len(plan_arms(name, [], tmp_path)) == runs
    assert read_study(name, [])["figure"]


def arm(key, *needs, seed=0):
    return Arm(name=key, axes=(), seed=seed, overrides=(), needs=needs, config={}, key=key)


def ending(ran):
    """Runs that end at once."""

    def run(one, here):
        ran.append(one.key)
        here.mkdir(parents=True)
        (here / DONE).write_text("{}")

    return run


def test_a_worker_does_what_is_left_in_order_and_what_is_needed_first(tmp_path):
    ran = []
    arms = [arm("late", "early"), arm("early"), arm("done")]
    done = arm_folder(tmp_path, "done")
    done.mkdir(parents=True)
    (done / DONE).write_text("{}")
    assert work(arms, tmp_path, 0.0, ending(ran))
    assert ran == ["early", "late"]
    assert work(arms, tmp_path, 0.0, ending(ran)) and ran == ["early", "late"]


def test_a_worker_leaves_alone_what_another_one_runs(tmp_path):
    ran = []
    (tmp_path / "runs").mkdir()
    with FileLock(tmp_path / "runs" / ".taken.lock"):
        assert work([arm("taken"), arm("free")], tmp_path, 0.0, ending(ran))
    assert ran == ["free"]


def test_a_run_that_fails_ends_its_worker_and_is_not_tried_again_before_the_next_study(tmp_path):
    ran = []

    def failing(one, here):
        if one.key == "bad":
            raise RuntimeError("out of memory")
        ending(ran)(one, here)

    arms = [arm("bad"), arm("needs bad", "bad"), arm("good")]
    began = time.time() - 1
    assert not work(arms, tmp_path, began, failing)
    assert work(arms, tmp_path, began, failing) and ran == ["good"]
    failed = json.loads((tmp_path / "runs" / f"bad.{FAILED}").read_text())
    assert "out of memory" in failed["error"]
    later = time.time() + 1
    assert not has_failed(arm_folder(tmp_path, "bad"), later)
    assert work(arms, tmp_path, later, ending(ran)) and ran == ["good", "bad", "needs bad"]


def results(axes, arms, figure="curves"):
    return {"experiment": "tiny", "figure": figure, "axes": axes, "arms": arms, "missing": []}


def run(name, axes, ends, seed=0, overrides=(), decode=1000.0):
    curve = [{"step": n, "tokens": 50_000 * n, "cross_entropy": value} for n, value in enumerate(ends)]
    rows = [
        {"cross_entropy": 3.0, "kv_bytes_per_token": 90.0, "batch_decode_tokens_per_s": 10.0},
        {"cross_entropy": ends[-1], "kv_bytes_per_token": 30.0, "batch_decode_tokens_per_s": decode},
    ]
    about = {"name": name, "axes": axes, "seed": seed, "overrides": list(overrides)}
    return about | {"evaluations": rows, "curve": curve}


CURVES = results(
    [["mean", "svd"], ["CE", "KL"]],
    [run("control", [], [3.0, 2.7]), run("svd, CE, longer", [], [9.0, 2.9])]
    + [run(f"{a}, {b}", [a, b], [9.0, 4.0, 3.2]) for a in ("mean", "svd") for b in ("CE", "KL")],
)
PAPER = results(
    [["4 heads", "1 head"], ["mean", "first", "random"]],
    [run("8 heads", [], [3.0, 2.9, 2.8], seed, ["alpha=0.1"]) for seed in (0, 1)]
    + [
        run(f"{a}, {b}", [a, b], [5.0 + seed, 4.0, 3.2], seed, ["alpha=0.1"], decode=None if b != "mean" else 500.0)
        for a in ("4 heads", "1 head")
        for b in ("mean", "first", "random")
        for seed in (0, 1)
    ],
    "gqa_paper",
)
COMPARED = results([["control", "MLA"]], [run(n, [n], [4.0, 3.1]) for n in ("control", "MLA")], "compare")


@pytest.mark.parametrize("record", [CURVES, PAPER, COMPARED], ids=lambda record: record["figure"])
@pytest.mark.parametrize("left", [1, None], ids=["one run", "all runs"])
def test_every_figure_is_drawn_from_the_results_alone_however_many_runs_have_ended(tmp_path, record, left):
    arms = record["arms"] if left is None else record["arms"][-left:]
    (tmp_path / "results.json").write_text(json.dumps(record | {"arms": arms}))
    (picture,) = draw(tmp_path / "results.json")
    assert picture.name == "tiny.png" and image.imread(picture).size > 0


def test_a_figure_is_drawn_where_only_what_others_need_has_ended(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(PAPER | {"arms": [run("pretrained", [], [9.0, 3.0])]}))
    assert image.imread(draw(tmp_path / "results.json")[0]).size > 0


def test_points_on_the_way_are_parts_of_the_original_training(tmp_path):
    arms = plan_arms("gqa_paper", ["pretraining_tokens=2e6"], tmp_path)
    assert len(arms) == 33
    uptrained = [arm for arm in arms if arm.name != "pretrained"]
    assert len(uptrained) == 30
    assert all(arm.config["validation"]["at_tokens"] == [2e4, 1e5] for arm in uptrained)
    assert all(arm.config["model"]["original_tokens"] == 2e6 for arm in uptrained)


def test_no_run_is_no_figure(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(CURVES | {"arms": []}))
    with pytest.raises(ValueError, match="no run that has ended"):
        draw(tmp_path / "results.json")


@pytest.mark.slow
def test_a_study_runs_resumes_and_shares_what_its_runs_have_in_common(tmp_path):
    """Two objectives from two starts; the second call does nothing but draw."""
    tiny = Tiny(tmp_path / "tiny")
    given = [one for one in tiny.overrides if not one.startswith("experiment=")]
    given += ["convert.calibration=null", "batch.size=2", "batch.seq_len=32", "max_steps=2", "data.domains=null"]
    given += ["data.format=auto", "validation.every_n_steps=2", "validation.at_tokens=[]", "logger=csv"]
    command = ["study", "recovery", *given, "--folder", str(tmp_path / "studies")]
    command += ["--only", "control", "mean, CE", "mean, KL"]
    variables = {"ATTNZOO_CACHE": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    for _ in range(2):
        done = run_attnzoo(tmp_path, *command, **variables)
        log = (tmp_path / "studies" / "recovery" / "worker_cpu.log").read_text()
        assert done.returncode == 0, done.stderr + log
    assert log.count("starts in") == 3
    record = json.loads((tmp_path / "studies" / "recovery" / "results.json").read_text())
    assert [one["name"] for one in record["arms"]] == ["control", "mean, CE", "mean, KL"]
    assert len(record["missing"]) == 16
    originals = [one["evaluations"][0] for one in record["arms"]]
    assert originals[1] == originals[2] and originals[0]["cross_entropy"] == originals[1]["cross_entropy"]
    assert len(list((tmp_path / "studies" / "common" / "converted").glob("*/config.json"))) == 1
    assert all(one["tokens_per_s"] > 0 and one["curve"][-1]["step"] == 2 for one in record["arms"])
    assert not list((tmp_path / "studies" / "runs").glob("*/checkpoints"))
