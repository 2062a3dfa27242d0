"""The report: what was measured, in a table, in JSON and as a picture."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from matplotlib import image

from recipes.evaluate import Evaluation
from recipes.report import print_table, write_report


def judged(name: str, cross_entropy: float, *, kv: float = 23040.0, speed: float | None = 40.0) -> Evaluation:
    perplexity = math.exp(min(cross_entropy, 700))
    return Evaluation(name, cross_entropy, perplexity, 0.25, 20_000, 134_515_008, kv, speed and speed * 20, speed)


THREE = [judged("original", 3.08), judged("converted", 9.66, kv=7680), judged("uptrained", 4.1, kv=7680)]
DETAILS = {
    "domains": {
        "plays": {"cross_entropy": 4.0, "accuracy": 0.2, "tokens": 99},
        "code": {"cross_entropy": 2.0, "accuracy": 0.4, "tokens": 99},
    },
    "context": [
        {"first": 1, "last": 63, "cross_entropy": 5.0, "tokens": 99},
        {"first": 64, "last": 127, "cross_entropy": 3.0, "tokens": 99},
    ],
    "samples": {"Enter": "ROMEO.\nWhat light?"},
    "tasks": {"arc_easy": {"acc": 0.25}},
}
CURVE = [{"step": n, "tokens": n * 1000, "cross_entropy": 9.66 - n} for n in range(6)]


def test_a_report_holds_every_number_and_a_picture(tmp_path):
    meta = {"model": "a/b", "attention": {"num_kv_heads": 1}}
    evaluations = [*THREE[:2], dataclasses.replace(THREE[2], **DETAILS)]
    write_report(tmp_path / "run", evaluations=evaluations, curve=CURVE, meta=meta)
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["report.json", "report.md", "report.png"]
    record = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [Evaluation(**row) for row in record["evaluations"]] == evaluations
    assert record["curve"] == CURVE and record["meta"] == meta
    text = (tmp_path / "run" / "report.md").read_text()
    for words in (
        "| converted | 15,678 | 9.660 | 25.0% | 134.5M | 7,680 | 800.0 | 40.00 |",
        "(report.png)",
        "- model: a/b",
    ):
        assert words in text
    assert "> ROMEO.\n> What light?" in text and '`{"num_kv_heads": 1}`' in text
    for words in (
        "| model | plays | code |",
        "| uptrained | 4.000 | 2.000 |",
        "| model | 1–63 | 64–127 |",
        "| uptrained | 5.000 | 3.000 |",
        "| uptrained | 0.250 |",
        "After `'Enter'`:\n\n**uptrained**",
    ):
        assert words in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 4 * 5 and len({line.count("|") for line in table[:5]}) == 1
    height, width, _ = image.imread(tmp_path / "run" / "report.png").shape
    assert width > 1000 and height > 500


@pytest.mark.parametrize(
    "evaluations, curve",
    [
        (THREE[:1], []),
        (THREE, []),
        ([judged("a", 800.0), judged("b", 0.0, kv=0.0)], CURVE[:1]),
        ([judged("a", 3.0, speed=None), judged("b", 3.0)], CURVE),
    ],
    ids=["one model", "no curve", "infinite and perfect", "speed of one alone"],
)
def test_a_report_of_anything_can_be_drawn(tmp_path, evaluations, curve, recwarn):
    write_report(tmp_path, evaluations=evaluations, curve=curve, meta={})
    assert image.imread(tmp_path / "report.png").size > 0
    assert not [str(warning.message) for warning in recwarn if "constrained" in str(warning.message)]


def test_the_table_fits_a_terminal_of_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_table(THREE)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if "uptrained" in line)
    assert row.split() == ["uptrained", "60.34", "4.100", "25.0%", "134.5M", "7,680", "800.0", "40.00"]


def test_speed_columns_are_left_out_when_nothing_was_timed(capsys):
    print_table([dataclasses.replace(one, prefill_tokens_per_s=None, decode_tokens_per_s=None) for one in THREE])
    assert "decode" not in capsys.readouterr().out


def test_a_report_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="evaluations is empty"):
        write_report(tmp_path / "run", evaluations=[], curve=[], meta={})
    assert not (tmp_path / "run").exists()
