"""DeepSpeed: what is refused without it, and with it the curve and the checkpoints of every other strategy."""

import importlib.util

import pytest

from recipes.run_folder import RunFolder
from recipes.trainer import build_strategy
from recipes.uptrain import main, uptrain
from recipes.zero import Zero
from tests.recipes.test_several_processes import COMMON, assert_close, tiny  # noqa: F401
from tests.support.processes import as_torchrun
from tests.support.recipes import run_command


def test_stage_3_is_refused_with_what_to_take_instead():
    with pytest.raises(ValueError, match=r"trainer.stage is 3, allowed are 1 and 2: .* trainer=fsdp"):
        Zero(stage=3, gradient_clip_norm=None, process_group_backend="gloo")


def test_without_deepspeed_the_error_says_how_to_install_it(tiny, monkeypatch):  # noqa: F811
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r'trainer.strategy=deepspeed needs DeepSpeed: pip install "attnzoo\[deepspeed\]"'
    ):
        build_strategy(tiny.config("trainer=deepspeed", "trainer.accelerator=cpu").trainer)


@pytest.mark.slow
def test_zero_gives_the_curve_of_one_process_and_goes_on_without_deepspeed(tiny, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)
    common = [*COMMON, "batch.size=1"]
    uptrain(tiny.config(*common, "batch.accumulate=4"), RunFolder(tmp_path / "one"))
    zero = [*tiny.overrides, *common, "batch.accumulate=2", "trainer.strategy=deepspeed", "hydra.run.dir=zero"]
    killed = as_torchrun(tmp_path, *zero, step=3, number=9)
    assert all(code != 0 for code, _ in killed)
    assert [path.name for path in (tmp_path / "zero/checkpoints").glob("step_*")] == ["step_00000002"]
    killed_again = as_torchrun(tmp_path, "resume=zero", step=5, number=9)
    assert all(code != 0 for code, _ in killed_again)
    assert [path.name for path in (tmp_path / "zero/checkpoints").glob("step_*")] == ["step_00000004"]
    run_command(monkeypatch, main, "resume=zero", "trainer.devices=1", "trainer.strategy=auto")
    assert_close(tmp_path / "zero", tmp_path / "one")
