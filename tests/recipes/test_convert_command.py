"""`attnzoo convert` on the command line."""

import json

import pytest

from recipes.convert import main
from tests.support.recipes import run_command
from tests.support.tiny_llama import save_tiny_llama


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
