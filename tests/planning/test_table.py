"""The rows of a plan, and how they are shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnzoo.masks import SlidingWindow
from attnzoo.planning import Gpu, markdown_table, plan, read_model, text_table, with_spec
from attnzoo.planning.table import short
from attnzoo.specs import GQA, MLA, Linear, spec_from_dict
from tests.planning.configs import DEEPSEEK_V3, GEMMA2_9B, GEMMA3_4B, GPT2, LLAMA_8B, LLAMA_405B, PUBLISHED, SMOLLM2

NAMES = [
    *("as it is", "int8 KV cache", "MHA", "GQA-8", "GQA-4", "GQA-2", "MQA", "MLA 512+64", "window 4096"),
    *("sparse 4096+64", "linear", "linear + window 64"),
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_public_model_has_all_rows_and_a_table_of_100_columns(name):
    made = plan(PUBLISHED[name][0], context=131072, batch=10000, gpu=Gpu(count=16))
    assert [row.name for row in made.rows] == NAMES
    assert max(map(len, text_table(made).splitlines())) <= 100
    record = json.loads(json.dumps(made.to_dict()))
    assert [row["name"] for row in record["rows"]] == NAMES
    for row, kept in zip(made.rows, record["rows"], strict=True):
        assert (None if row.spec is None else spec_from_dict(kept["spec"])) == row.spec
        assert kept["parameters"] == row.cost.parameters if row.cost else kept["refusal"] == row.refusal


def test_heads_that_do_not_divide_are_said_in_the_table():
    made = plan(SMOLLM2, also=[GQA(3), GQA(9, SlidingWindow(100)), MLA(128)])
    text = text_table(made)
    assert "GQA-8: num_kv_heads must divide 9 heads, got 8." in text
    assert made.rows[3].cost is None and made.rows[-3].cost == made.rows[0].cost
    assert [row.name for row in made.rows[-3:]] == [
        "gqa num_kv_heads=3",
        "gqa num_kv_heads=9 SlidingWindow(window=100)",
        "mla kv_lora_rank=128",
    ]
    assert "| gqa num_kv_heads=9 SlidingWindow(window=100) | 148M |" in markdown_table(made)


def test_a_model_that_does_not_fit_is_said_in_the_table():
    text = text_table(plan(LLAMA_405B))
    assert "as it is * " in text and "do not fit into 72 GB" in text and "as it is 12" in text.replace("\n  ", " ")
    assert "*" not in text_table(plan(GPT2))
    assert "only the language model of gemma3 is counted" in text_table(plan(GEMMA3_4B))
    assert "671B parameters (37.6B active)" in text_table(plan(DEEPSEEK_V3))


def test_a_spec_changes_what_it_names_and_leaves_the_rest():
    gemma = read_model(GEMMA2_9B)
    fewer = with_spec(gemma, GQA(2))
    assert [layer.attention.mask for layer in fewer.layers] == [layer.attention.mask for layer in gemma.layers]
    assert with_spec(gemma, GQA()) == gemma
    deepseek = read_model(DEEPSEEK_V3)
    assert with_spec(deepseek, GQA()) == with_spec(deepseek, MLA(512, qk_rope_head_dim=64)) == deepseek
    windowed = with_spec(deepseek, GQA(mask=SlidingWindow(100)))
    assert windowed.cache_bytes(1000, 2) == 61 * 100 * 576 * 2
    assert with_spec(deepseek, GQA(8)).cache_bytes(1000, 2) == 61 * 1000 * 2 * 8 * 128 * 2
    assert with_spec(deepseek, Linear(num_kv_heads=1)).cache_bytes(1, 2) == 61 * 128 * 129 * 4


def test_numbers_are_short_and_keep_three_digits():
    assert [short(n) for n in (0, 7, 0.5, 9999, 10_000, 99_950, 999_600, 4.056e11, 7.24e9)] == [
        *("0", "7", "0.5", "9999", "10.0k", "100k", "1.00M", "406G", "7.24G")
    ]


def test_the_tables_of_the_docs_are_those_that_are_printed():
    page = (Path(__file__).parents[2] / "docs/plan.md").read_text(encoding="utf-8")
    for made in (
        plan(LLAMA_8B, context=32768, batch=8),
        plan(LLAMA_405B, context=131072, batch=4, gpu=Gpu(count=16)),
        plan(DEEPSEEK_V3, context=131072, batch=64, gpu=Gpu(141, 4800, count=16)),
    ):
        assert "".join(f"    {line}".rstrip() + "\n" for line in text_table(made).splitlines()) in page
