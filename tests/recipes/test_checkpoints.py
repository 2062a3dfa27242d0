"""Checkpoints: what is in their files, what becomes of them on a bad disk, and what signals make of a run."""

import json
import logging
import math
import os
import resource
import signal

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import recipes.checkpoint_files as checkpoint_files
from recipes.checkpoint_files import Broken, NotWritten, read_checkpoint, write_checkpoint
from recipes.checkpoint_state import Stored, load_whole
from recipes.checkpointing import Checkpoints, SafetensorsIO, last_checkpoint
from recipes.objectives import Objective
from recipes.run_folder import RunFolder
from recipes.uptrain import uptrain
from tests.support.recipes import Tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Tiny(tmp_path_factory.mktemp("tiny"))


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    shared = torch.randn(3, 2)
    saved = {
        "state_dict": {"a": shared, "tied": shared, "b": torch.randn(2, 3).T, "bf16": torch.randn(4).bfloat16()},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.95)}]}],
        "loops": {"none": None, "rate": 0.1 + 0.2, "best": math.inf, "empty": torch.empty(0), "done": True},
        "nan": torch.tensor([math.nan, 1.0]),
    }
    path = tmp_path / "step_00000003"
    SafetensorsIO().save_checkpoint(saved, path)
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "state.json", "tensors.safetensors"]
    again = SafetensorsIO().load_checkpoint(path)
    for name, weight in saved["state_dict"].items():
        assert torch.equal(again["state_dict"][name], weight) and again["state_dict"][name].dtype == weight.dtype
    assert again["optimizer_states"][0]["state"][0]["step"] == 3
    assert again["optimizer_states"][0]["param_groups"] == saved["optimizer_states"][0]["param_groups"]
    assert again["loops"].pop("empty").shape == (0,)
    saved["loops"].pop("empty")
    assert again["loops"] == saved["loops"]
    assert again["nan"].isnan().tolist() == [True, False]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("cuts", [(7,), (3, 7), (3, 6, 7, 7), (7, 7)])
def test_any_part_of_a_tensor_is_read_from_the_parts_that_it_was_stored_in(tmp_path, dim, cuts):
    whole = torch.arange(42.0).reshape(7, 6) if dim == 0 else torch.arange(42.0).reshape(6, 7)
    files = []
    for number, (start, end) in enumerate(zip((0, *cuts), cuts, strict=False)):
        files.append(tmp_path / f"{number}.safetensors")
        save_file({"weight": whole.narrow(dim, start, end - start).contiguous()}, files[-1])
    stored = Stored(tuple(safe_open(file, "pt") for file in files), "weight", dim)
    assert torch.equal(stored.whole(), whole) and stored.shape() == whole.shape
    for along in (0, 1):
        rows = whole.shape[along]
        for start in range(rows + 1):
            for stop in range(start, rows + 1):
                assert torch.equal(stored.part(along, start, stop), whole.narrow(along, start, stop - start))


def test_what_was_changed_on_the_disk_is_refused_by_name(tmp_path):
    path = tmp_path / "step_00000001"
    write_checkpoint({"a": torch.ones(100)}, path)
    tensors = path / "tensors.safetensors"
    good = tensors.read_bytes()
    tensors.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(Broken, match=r"step_00000001 is damaged: tensors.safetensors is not what was written"):
        read_checkpoint(path)
    tensors.unlink()
    with pytest.raises(Broken, match=r"tensors.safetensors is missing"):
        read_checkpoint(path)
    tensors.write_bytes(good)
    assert load_whole(read_checkpoint(path))["a"].sum() == 100
    (path / "manifest.json").unlink()
    with pytest.raises(Broken, match=r"manifest.json cannot be read"):
        read_checkpoint(path)


def half_written(tensors, file):
    save_file(tensors, file)
    with open(file, "r+b") as half:
        half.truncate(os.path.getsize(file) // 2)
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def silently_changed(tensors, file):
    save_file(tensors, file)
    with open(file, "r+b") as changed:
        changed.seek(-1, os.SEEK_END)
        changed.write(b"\xaa")


@pytest.mark.parametrize(
    ("writes", "message"), [(half_written, "No space left"), (silently_changed, "/a came back from the disk changed")]
)
def test_a_save_that_fails_leaves_the_last_checkpoint_and_nothing_else(tmp_path, monkeypatch, writes, message):
    write_checkpoint({"a": torch.ones(2)}, tmp_path / "step_00000001")
    with pytest.raises(TypeError, match="cannot hold the object at /b"):
        write_checkpoint({"b": object()}, tmp_path / "step_00000002")
    monkeypatch.setattr(checkpoint_files, "save_file", writes)
    with pytest.raises(NotWritten, match=message):
        write_checkpoint({"a": torch.ones(2)}, tmp_path / "step_00000002")
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert last_checkpoint(tmp_path) == tmp_path / "step_00000001"
    read_checkpoint(tmp_path / "step_00000001")


def test_a_file_that_the_system_does_not_let_grow_is_no_checkpoint(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as a full disk: the write itself fails
    try:
        with pytest.raises(NotWritten):
            write_checkpoint({"a": torch.ones(100_000)}, tmp_path / "step_00000002")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("last_fails", [False, True])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tiny, tmp_path, monkeypatch, caplog, last_fails):
    """Of the checkpoints after steps 1 to 4 the second and the third fail, or all from the second on."""
    run, kept = RunFolder(tmp_path / "run"), []

    def full(tensors, file):
        kept.append([path.name for path in run.checkpoints.glob("step_*")])
        if len(kept) in (2, 3) or (last_fails and len(kept) > 1):
            half_written(tensors, file)
        save_file(tensors, file)

    monkeypatch.setattr(checkpoint_files, "save_file", full)
    with caplog.at_level(logging.ERROR):
        uptrain(tiny.config("max_steps=4", "checkpoint.every_n_steps=1"), run)
    assert kept == [[], *[["step_00000001"]] * 3]
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_00000001" if last_fails else "step_00000004"]
    assert "the checkpoint of step 3 failed" in caplog.text and "step_00000001 stays the last one" in caplog.text
    assert (run.uptrained / "model.safetensors").is_file()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(tiny, tmp_path, monkeypatch, number, code):
    run, calls, before = RunFolder(tmp_path / "run"), [], signal.getsignal(number)

    def signalled(self, model, *rest, original=Objective.__call__):
        calls.append(model.training)
        if model.training and sum(calls) == 2:
            os.kill(os.getpid(), number)
        return original(self, model, *rest)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exited:
        patch.setattr(Objective, "__call__", signalled)
        uptrain(tiny.config("max_steps=4", "checkpoint.every_n_steps=null"), run)
    assert exited.value.code == code
    assert signal.getsignal(number) is before
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_00000002"]


def test_a_handler_that_was_there_runs_after_the_checkpoint(tiny, tmp_path, monkeypatch):
    """As submitit's, which queues the job again."""
    run, seen = RunFolder(tmp_path / "run"), []
    before = signal.signal(signal.SIGUSR2, lambda number, _: seen.append([p.name for p in run.checkpoints.iterdir()]))

    def signalled(self, model, *rest, original=Objective.__call__):
        if model.training:
            os.kill(os.getpid(), signal.SIGUSR2)
        return original(self, model, *rest)

    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as exited:
            patch.setattr(Objective, "__call__", signalled)
            uptrain(tiny.config("max_steps=4", "validation.every_n_steps=4"), run)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert exited.value.code == 75
    assert seen[-1] == ["step_00000001"]


def test_a_stop_whose_checkpoint_fails_says_what_is_left(tiny, tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")

    def full_and_stopped(tensors, file):
        if "step_00000001" not in str(file):
            half_written(tensors, file)
        save_file(tensors, file)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint_files, "save_file", full_and_stopped)
    with pytest.raises(NotWritten, match=r"stopped after step 2, .* No space left .*step_00000001 stays the last one"):
        uptrain(tiny.config("max_steps=4", "checkpoint.every_n_steps=1"), run)
    read_checkpoint(run.checkpoints / "step_00000001")


def test_the_first_ctrl_c_waits_for_the_step_and_the_second_does_not(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints._stop(signal.SIGTERM, None)
    checkpoints._stop(signal.SIGINT, None)
    assert checkpoints.stopped_by == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        checkpoints._stop(signal.SIGINT, None)


def test_the_manifest_names_every_other_file(tmp_path):
    write_checkpoint({"a": torch.ones(2)}, tmp_path / "step_00000001")
    files = json.loads((tmp_path / "step_00000001" / "manifest.json").read_text())["files"]
    assert {*files, "manifest.json"} == {path.name for path in (tmp_path / "step_00000001").iterdir()}
