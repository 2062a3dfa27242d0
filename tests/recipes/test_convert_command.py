"""`attnzoo convert` on the command line."""

import json

import pytest

from recipes.convert import main
from tests.support.recipes import run_command
from tests.support.tiny_llama import save_text, save_tiny_llama


def test_convert_writes_the_folder_that_it_was_told_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_llama(tmp_path / "model")
    command = ["model.path=model", "attention.num_kv_heads=1", "convert=first", "out=new"]
    run_command(monkeypatch, main, *command)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new"]
    assert json.loads((tmp_path / "new/config.json").read_text())["num_key_value_heads"] == 1
    assert (tmp_path / "new/tokenizer.json").is_file() and (tmp_path / "new/generation_config.json").is_file()

    (tmp_path / "new/mark").touch()
    with pytest.raises(ValueError, match="exists"):
        run_command(monkeypatch, main, *command)
    assert (tmp_path / "new/mark").exists()
    run_command(monkeypatch, main, *command, "overwrite=true")
    assert not (tmp_path / "new/mark").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["out=new", "attention.num_kv_heads=1"], "model.path"),
        (["out=new", "model.path=model"], "attention.num_kv_heads"),
        (["model.path=model", "attention.num_kv_heads=1"], "out"),
        (["out=new", "model.path=model", "attention.num_kv_heads=1", "convert.method=median"], "median"),
        (["out=new", "model.path=model", "attention.heads=1"], "heads"),
        (["out=new", "model.path=./nowhere", "attention.num_kv_heads=1"], "nowhere"),
    ],
)
def test_convert_refuses_what_it_cannot_do_and_writes_nothing(tmp_path, monkeypatch, overrides, message):
    monkeypatch.chdir(tmp_path)
    save_tiny_llama(tmp_path / "model")
    with pytest.raises(Exception, match=message):
        run_command(monkeypatch, main, *overrides)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_methods_are_compared_on_text_that_none_of_them_read(tmp_path, monkeypatch, capsys):
    from attnzoo.cli import main as command

    monkeypatch.chdir(tmp_path)
    save_tiny_llama(tmp_path / "model")
    save_text(tmp_path / "text")
    save_text(tmp_path / "other", seed=1)
    options = ["model.path=model", "attention.num_kv_heads=1", "convert.calibration=text", "held_out=[other]"]
    sizes = ["convert.samples=12", "convert.sample_length=8", "convert.steps=3"]
    assert command(["convert", "--compare", "mean,svd,regress", *options, *sizes, "out=new"]) == 0
    record = json.loads((tmp_path / "new/damage.json").read_text())
    assert [one["method"] for one in record] == ["mean", "svd", "regress"]
    assert all(one["held_out"] and len(one["layers"]) == 2 for one in record)
    assert len({one["cross_entropy_before"] for one in record}) == 1
    assert record[1]["layers"][0]["attention_error"] < record[0]["layers"][0]["attention_error"]
    assert (tmp_path / "new/damage.png").stat().st_size > 10_000
    assert (tmp_path / "new/svd/model.safetensors").is_file()
    assert not list((tmp_path / "new").glob(".*"))
    printed = capsys.readouterr().out
    assert "regress" in printed and "original" in printed


def test_comparing_needs_text_to_judge_by(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_llama(tmp_path / "model")
    with pytest.raises(ValueError, match="held_out"):
        options = ["model.path=model", "attention.num_kv_heads=1", "compare=[mean]", "out=new"]
        run_command(monkeypatch, main, *options)
    assert not (tmp_path / "new").exists()


def test_a_conversion_on_text_leaves_its_damage_beside_the_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_llama(tmp_path / "model")
    save_text(tmp_path / "text")
    options = ["convert.calibration=text", "convert.samples=12", "convert.sample_length=8"]
    run_command(monkeypatch, main, "model.path=model", "attention.num_kv_heads=1", "out=new", *options)
    assert json.loads((tmp_path / "new/config.json").read_text())["attnzoo"]["method"] == "svd"
    record = json.loads((tmp_path / "new/damage.json").read_text())
    assert record[0]["method"] == "svd" and not record[0]["held_out"]


@pytest.mark.parametrize(
    ("attention", "layers", "model_type"),
    [
        (["attention=window", "attention.mask.window=3"], "1", "ministral"),
        (["attention=window_sinks", "attention.mask.first.window=3"], "[0]", "attnzoo_llama"),
        (["attention=linear", "attention.window=2"], "{share: 0.9, length: 4096}", "attnzoo_llama"),
    ],
)
@pytest.mark.filterwarnings("ignore:save_pretrained")
def test_some_layers_are_given_a_window_or_linear_attention(tmp_path, monkeypatch, attention, layers, model_type):
    monkeypatch.chdir(tmp_path)
    save_tiny_llama(tmp_path / "model")
    save_text(tmp_path / "text")
    sizes = ["convert.calibration=text", "convert.samples=6", "convert.sample_length=8", "convert.steps=2"]
    run_command(monkeypatch, main, "model.path=model", *attention, *sizes, f"convert.layers={layers}", "out=new")
    assert json.loads((tmp_path / "new/config.json").read_text())["model_type"] == model_type
    assert (tmp_path / "new/tokenizer.json").is_file()
    damage = json.loads((tmp_path / "new/damage.json").read_text())[0]
    assert len(damage["changed"]) == 1 and len(damage["layers"]) == 2
