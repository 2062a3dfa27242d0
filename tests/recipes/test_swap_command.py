"""`attnzoo swap` on the command line."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import attnzoo
import attnzoo.hf
from attnzoo import GQA, MLA
from attnzoo.cli import main
from tests.support.tiny_llama import save_tiny_llama

PROMPT = torch.arange(2, 14)[None]
LOADS_ALONE = """
import sys
sys.modules["attnzoo"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("new", trust_remote_code=True)
assert AutoTokenizer.from_pretrained("new").eos_token == "<eos>"
torch.save(model(torch.arange(2, 14)[None]).logits.detach(), "logits.pt")
"""


@pytest.mark.filterwarnings("ignore:save_pretrained of this model")
def test_a_swapped_folder_computes_what_the_swapped_model_does_with_and_without_attnzoo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_llama(tmp_path / "model")
    assert main(["swap", "model.path=model", "attention=mla", "attention.kv_lora_rank=8", "layers=[1]", "out=new"]) == 0
    model = AutoModelForCausalLM.from_pretrained("model")
    truth = attnzoo.swap(model, [GQA(), MLA(kv_lora_rank=8)])(PROMPT).logits
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained("new")(PROMPT).logits, truth)
    subprocess.run([sys.executable, "-c", LOADS_ALONE], check=True, timeout=120)
    torch.testing.assert_close(torch.load("logits.pt"), truth)


def test_what_a_stock_class_holds_is_saved_as_that(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_llama(tmp_path / "model")
    assert main(["swap", "model.path=model", "attention.num_kv_heads=1", "out=new"]) == 0
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert (config["model_type"], config["num_key_value_heads"]) == ("llama", 1)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["attention.num_kv_heads=1", "layers=[2]"], "layers names [2]"),
        (["attention.num_kv_heads=3"], "num_kv_heads"),
        (["attention.num_kv_heads=1", "out=model"], "exists"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys, overrides, said):
    monkeypatch.chdir(tmp_path)
    save_tiny_llama(tmp_path / "model")
    assert main(["swap", "model.path=model", "out=new", *overrides]) == 1
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
