"""Models that have learned nothing: made once, by config and seed, with a tokenizer of the text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recipes.models import load_model, load_tokenizer, model_path
from recipes.run_folder import RunFolder
from recipes.uptrain import uptrain
from tests.support.recipes import Tiny
from tests.support.text import caches  # noqa: F401

CONFIG = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}


@pytest.fixture
def scratch(caches):  # noqa: F811
    """A conf/model/scratch group with a little text to learn a tokenizer from."""
    text = caches / "text.jsonl"
    lines = [f"def function_{n}(x):\n    return x + {n}\n" for n in range(200)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    tokenizer = {"path": None, "text": [str(text)], "vocab_size": 300, "bytes": 4000}
    made = {"config": CONFIG, "tokenizer": tokenizer, "seed": 0}
    return {
        "path": None,
        "scratch": made,
        "dtype": "float32",
        "attn_implementation": "sdpa",
        "trust_remote_code": False,
    }


def test_a_model_is_made_once_from_its_config_and_a_tokenizer_of_the_text(scratch):
    folder = Path(model_path(scratch))
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert Path(model_path(scratch)) == folder and (folder / "model.safetensors").stat().st_mtime_ns == written
    model, tokenizer = load_model(scratch), load_tokenizer(scratch)
    assert model.config.num_key_value_heads == 4 and model.config.vocab_size == len(tokenizer)
    assert 256 < len(tokenizer) <= 300
    assert model.config.eos_token_id == tokenizer.eos_token_id is not None
    line = "def function_7(x):\n    return x + 123\n"
    ids = tokenizer(line)["input_ids"]
    assert tokenizer.decode(ids) == line and len(ids) < len(line) / 2


def test_another_seed_gives_other_weights_and_the_same_tokenizer(scratch):
    other = {**scratch, "scratch": {**scratch["scratch"], "seed": 1}}
    one, two = load_model(scratch), load_model(other)
    assert not torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert load_tokenizer(scratch).get_vocab() == load_tokenizer(other).get_vocab()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 0, "sed": 1}, "model.scratch has the fields"),
        ({"config": {"hidden_size": 32}}, "no model_type"),
        ({"tokenizer": {"path": None, "text": ["/no/file"], "vocab_size": 300, "bytes": 10}}, "there is no file"),
    ],
)
def test_what_cannot_be_made_is_refused_and_leaves_nothing(scratch, caches, change, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        model_path({**scratch, "scratch": {**scratch["scratch"], **change}})
    assert not [
        path for path in (caches / "attnzoo-cache").rglob("*") if path.is_dir() and path.name.endswith("partial")
    ]


def test_a_model_from_scratch_is_pretrained_and_then_converted(scratch, tmp_path):
    tiny = Tiny(tmp_path / "tiny")
    given = ["model=scratch", "attention=original", "model.path=null", "model.attn_implementation=sdpa"]
    given += [f"model.scratch.config.{key}={value}" for key, value in CONFIG.items()]
    given += ["model.scratch.config.head_dim=8", "model.scratch.tokenizer.vocab_size=300"]
    given += [f"model.scratch.tokenizer.text={scratch['scratch']['tokenizer']['text']}"]
    run = RunFolder(tmp_path / "pretrained")
    uptrain(tiny.config(*given), run)
    before, after = (run.evaluations[name].cross_entropy for name in ("original", "uptrained"))
    assert after < before
    converted = RunFolder(tmp_path / "converted")
    uptrain(tiny.config(f"model.path={run.uptrained}", "attention.num_kv_heads=2", "max_steps=1"), converted)
    assert converted.evaluations["original"].cross_entropy == pytest.approx(after, abs=1e-5)
