"""What runs have in common is made once, also by runs side by side, and told apart by what it was made from."""

from __future__ import annotations

import json
import threading

import pytest

from recipes.calibration import calibrated, write_calibration
from recipes.common import Common, of_model
from recipes.data import TextDataModule
from recipes.run_folder import RunFolder
from recipes.uptrain import uptrain
from tests.support.recipes import Tiny
from tests.support.text import caches, documents, word_tokenizer, write_corpus  # noqa: F401


def test_a_place_belongs_to_what_is_made_there(tmp_path):
    common = Common(tmp_path)
    one, two = (common.place("converted", {"heads": heads}, own=tmp_path) for heads in (1, 2))
    assert one != two and one == common.place("converted", {"heads": 1}, own=tmp_path)
    assert Common(None).place("converted", {"heads": 1}, own=tmp_path / "own") == tmp_path / "own"


def test_runs_side_by_side_make_a_thing_once(tmp_path):
    made = []

    def make():
        made.append(1)
        (tmp_path / "thing").mkdir()

    threads = [threading.Thread(target=Common(tmp_path).once, args=(tmp_path / "thing", make)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_a_value_is_kept_by_its_identity_and_only_with_a_folder(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"loss": len(calls)}

    for common in (Common(tmp_path), Common(tmp_path)):
        assert common.value("evaluations", "a", make) == {"loss": 1}
    assert Common(tmp_path).value("evaluations", "b", make) == {"loss": 2}
    assert [Common(None).value("evaluations", "a", make)["loss"] for _ in range(2)] == [3, 4]


def test_a_model_is_told_by_its_config_and_its_weights(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"123")
    before = of_model(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert of_model(folder) == before
    (folder / "model.safetensors").write_bytes(b"1234")
    assert of_model(folder) != before


@pytest.fixture
def tiny(tmp_path, caches):  # noqa: F811
    return Tiny(tmp_path / "tiny")


def test_two_runs_convert_and_judge_once_and_report_the_same_start(tiny, tmp_path):
    shared = tmp_path / "common"
    for seed, name in ((0, "one"), (1, "two")):
        config = tiny.config(f"seed={seed}", "convert.seed=0", f"common={shared}")
        uptrain(config, RunFolder(tmp_path / name))
    one, two = (json.loads((tmp_path / name / "report.json").read_text())["evaluations"] for name in ("one", "two"))
    assert one[:2] == two[:2] and one[2] != two[2]
    assert len(list((shared / "converted").glob("*/config.json"))) == 1
    assert len(list((shared / "evaluations").glob("*.json"))) == 2
    assert not (tmp_path / "one" / "converted").exists()


def test_domains_are_judged_and_followed_one_by_one(tiny, tmp_path):
    text = tiny.text
    domains = f"data.domains={{a:{{weight:1,path:{text}}},b:{{weight:3,path:{text},val_fraction:0.4}}}}"
    run = RunFolder(tmp_path / "run")
    config = tiny.config(domains, "max_steps=4", "validation.every_n_steps=100", "validation.at_tokens=[1,300]")
    uptrain(config, run)
    report = json.loads((run.path / "report.json").read_text())
    curve = report["curve"]
    per_step = curve[1]["tokens"]
    expected = [0, 1, -(-300 // per_step), 4]
    assert [point["step"] for point in curve] == list(dict.fromkeys(expected))
    for point in curve:
        assert set(point["domains"]) == {"a", "b"}
        assert point["cross_entropy"] == pytest.approx(sum(point["domains"].values()) / 2)
    last = report["evaluations"][-1]
    assert set(last["domains"]) == {"a", "b"}
    text = (run.path / "report.md").read_text()
    assert "## Cross-entropy by domain" in text


def test_calibration_text_is_of_the_training_text_in_its_proportions(caches, tmp_path):  # noqa: F811
    domains, words = {}, []
    for name, weight in (("plays", 1), ("code", 3)):
        texts = [text.replace("d", name) for text in documents([40] * 12)]
        write_corpus(tmp_path / name, texts)
        words += " ".join(texts).split()
        domains[name] = {"weight": weight, "path": str(tmp_path / name)}
    data = TextDataModule(
        {"path": str(tmp_path), "domains": domains, "val_fraction": 0.2},
        word_tokenizer(words),
        seq_len=16,
        batch_size=4,
    )
    held_out = {token for batch in data.val_batches() for token in batch["input_ids"][0].tolist()} - {0}
    write_calibration(data, tmp_path, samples=8, length=8)
    pieces = [path.read_text() for path in sorted(tmp_path.glob("*.txt"))]
    assert len(pieces) == 8 and all(len(piece.split()) >= 8 for piece in pieces)
    assert 1 <= sum("plays" in piece for piece in pieces) <= 3
    seen = {token for piece in pieces for token in data.tokenizer(piece)["input_ids"]}
    assert not seen & held_out
    with pytest.raises(ValueError, match="no document of 16 tokens"):
        short = TextDataModule({"path": str(tmp_path / "short")}, data.tokenizer, seq_len=16, batch_size=2)
        write_corpus(tmp_path / "short", ["plays0w0 plays0w1"] * 9 + ["code0w0 code0w1"])
        write_calibration(short, tmp_path, samples=2, length=64)


def test_another_calibration_stays_as_it_is(tmp_path):
    with calibrated({"calibration": "texts", "samples": 3}, None) as convert:
        assert convert == {"calibration": "texts", "samples": 3}
