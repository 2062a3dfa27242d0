"""LoRA adapters, and embeddings that train apart from the head."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from recipes.embeddings import tie, untie
from recipes.lora import add_lora, merge_lora
from recipes.models import load_model
from recipes.run_folder import RunFolder
from recipes.uptrain import uptrain
from tests.support.recipes import Tiny

pytest.importorskip("peft")

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": None}
TOKENS = torch.randint(0, 62, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tied(tiny, tmp_path_factory):
    """The tiny model with one matrix for embeddings and head."""
    folder = tmp_path_factory.mktemp("tied") / "model"
    model = load_model(tiny.config().model)
    config = LlamaConfig(**model.config.to_dict() | {"tie_word_embeddings": True})
    made = LlamaForCausalLM(config)
    made.load_state_dict(model.state_dict(), strict=False)
    made.tie_weights()
    made.save_pretrained(folder)
    for file in tiny.model.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_adapters_change_nothing_at_first_and_as_much_merged_as_beside_the_weights(tiny):
    model = load_model(tiny.config().model)
    before = logits(model)
    add_lora(model, LORA, seed=0)
    torch.testing.assert_close(logits(model), before)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    beside = logits(model)
    assert (beside - before).abs().max() > 0.01
    merge_lora(model)
    torch.testing.assert_close(logits(model), beside, atol=1e-5, rtol=1e-5)
    assert model.state_dict().keys() == load_model(tiny.config().model).state_dict().keys()


def test_a_run_with_adapters_leaves_a_stock_folder_that_needs_no_peft(tiny, tmp_path):
    run = RunFolder(tmp_path / "run")
    uptrain(tiny.config("lora={rank: 4, alpha: 8, dropout: 0.1, targets: [q_proj, o_proj]}", "train=lora"), run)
    converted = load_file(run.converted / "model.safetensors")
    uptrained = load_file(run.uptrained / "model.safetensors")
    for name, weight in converted.items():
        assert torch.equal(uptrained[name], weight) == (not name.endswith(("q_proj.weight", "o_proj.weight"))), name
    script = f"""
import sys
sys.modules["peft"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(run.uptrained)!r})
assert type(model).__name__ == "LlamaForCausalLM" and not any("lora" in name for name in model.state_dict())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_has_an_adapter_stays_and_the_rest_trains_as_train_says(tiny, tmp_path):
    model, _ = tiny.train(
        tmp_path / "run", "lora={rank: 2, alpha: 2, dropout: 0.0, targets: [v_proj]}", "train=attention"
    )
    before = load_model(tiny.config().model).state_dict()
    for name, weight in model.state_dict().items():
        if ".lora_" not in name:
            trains = ".self_attn." in name and "v_proj" not in name
            assert torch.equal(weight, before[name.replace(".base_layer", "")]) == (not trains), name


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("{rank: 4, alpha: 8, dropout: 0.0, targets: [nothing]}", "nothing"),
        ("{rank: 0, alpha: 8, dropout: 0.0, targets: null}", "0"),
        ("{rank: 4, alpha: 8, dropout: 0.0, targets: null, bias: all}", "lora.bias is no field"),
    ],
)
def test_adapters_that_are_not_clear_are_refused(tiny, tmp_path, lora, message):
    with pytest.raises(ValueError, match=message):
        tiny.train(tmp_path / "run", f"lora={lora}")


@pytest.mark.parametrize("at_export", ["tie", "keep"])
def test_embeddings_and_head_train_apart_and_end_tied_or_as_they_are(tiny, tied, tmp_path, at_export):
    run = RunFolder(tmp_path / "run")
    config = tiny.config(f"untie_embeddings={at_export}", f"model.path={tied}", "checkpoint.every_n_steps=2")
    uptrain(config, run)
    trained = load_file(next(run.checkpoints.glob("*/*.safetensors")))
    inputs, outputs = (
        next(weight for name, weight in trained.items() if name.endswith(end) and "state_dict" in name)
        for end in ("embed_tokens.weight", "lm_head.weight")
    )
    assert not torch.equal(inputs, outputs)
    model = AutoModelForCausalLM.from_pretrained(run.uptrained)
    config = json.loads((run.uptrained / "config.json").read_text())
    assert config["tie_word_embeddings"] == (at_export == "tie")
    if at_export == "tie":
        assert model.lm_head.weight is model.model.embed_tokens.weight
        torch.testing.assert_close(model.lm_head.weight.data, (inputs + outputs) / 2)
    else:
        assert torch.equal(model.lm_head.weight, outputs) and torch.equal(model.model.embed_tokens.weight, inputs)


def test_tying_what_is_still_equal_changes_nothing(tied):
    model = load_model(
        {"path": str(tied), "dtype": "float32", "attn_implementation": "sdpa", "trust_remote_code": False}
    )
    before = logits(model)
    untie(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="untie_embeddings is for models that tie"):
        untie(model)
    tie(model)
    assert torch.equal(logits(model), before)
