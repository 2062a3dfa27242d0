"""The output appears whole or not at all, whatever ends the process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from attnzoo.conversion import checkpoint as room
from attnzoo.conversion import convert_checkpoint, folders
from attnzoo.conversion.folders import whole_folder
from attnzoo.specs import GQA
from tests.conversion.models import tiny


def write(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_text(text)


def test_the_folder_is_not_there_until_the_block_ends(tmp_path):
    out = tmp_path / "new" / "parents" / "out"
    with whole_folder(out) as new:
        write(new, "whole")
        assert not out.exists() and new.parent == out.parent and new.name.startswith(".out.")
    assert (out / "inner" / "file").read_text() == "whole"
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("renameat2", [True, False])
def test_overwriting_replaces_the_old_folder_once_the_new_one_is_complete(tmp_path, monkeypatch, renameat2):
    if not renameat2:
        monkeypatch.setattr(folders.sys, "platform", "other")
    out = tmp_path / "out"
    out.mkdir()
    write(out, "old")
    (out / "only_in_the_old").touch()
    with whole_folder(out, overwrite=True) as new:
        write(new, "new")
        assert (out / "config.json").read_text() == "old"
    assert (out / "config.json").read_text() == "new" and not (out / "only_in_the_old").exists()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_exception_leaves_the_old_folder_and_nothing_else(tmp_path, error):
    out = tmp_path / "out"
    out.mkdir()
    write(out, "old")
    with pytest.raises(error), whole_folder(out, overwrite=True) as new:
        write(new, "new")
        raise error
    assert (out / "config.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(ValueError, match="exists already"), whole_folder(tmp_path / "out") as new:
        write(new, "new")
        (tmp_path / "out").mkdir()
        write(tmp_path / "out", "other")
    assert (tmp_path / "out" / "config.json").read_text() == "other"
    assert os.listdir(tmp_path) == ["out"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with whole_folder(tmp_path / "link", overwrite=True) as new:
        write(new, "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").read_text() == "new"


def test_ctrl_c_in_the_middle_of_a_conversion_leaves_nothing(tmp_path, monkeypatch):
    tiny("llama").save_pretrained(tmp_path / "source")
    real, calls = room.ShardWriter.write, []

    def write(self, name, tensor):
        calls.append(name)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        real(self, name, tensor)

    monkeypatch.setattr(room.ShardWriter, "write", write)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(tmp_path / "source", GQA(2), tmp_path / "out")
    finally:
        signal.signal(signal.SIGINT, before)
    assert os.listdir(tmp_path) == ["source"]


_KILLED = """
import os, signal, sys
from attnzoo.conversion import checkpoint, convert_checkpoint
from attnzoo.specs import GQA

real, calls = checkpoint.ShardWriter.write, []

def write(self, name, tensor):
    calls.append(name)
    if len(calls) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, name, tensor)

checkpoint.ShardWriter.write = write
convert_checkpoint(sys.argv[1], GQA(2), sys.argv[2], overwrite=True)
"""


def test_kill_in_the_middle_leaves_the_old_output_and_does_not_disturb_the_next_run(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny("llama").save_pretrained(source, max_shard_size="20KB")
    convert_checkpoint(source, GQA(3), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", _KILLED, source, out], cwd=root, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (left,) = (path for path in tmp_path.iterdir() if path not in (source, out))
    assert left.name.startswith(".out.") and left.name.endswith(".partial")
    assert any(left.iterdir()) and not (left / "config.json").exists()
    convert_checkpoint(source, GQA(2), out, overwrite=True)
    k = {k: v for path in out.glob("*.safetensors") for k, v in load_file(path).items() if k.endswith("k_proj.weight")}
    assert [tensor.shape[0] for tensor in k.values()] == [20, 20]
