"""Swapped models to disk and back: as the stock family, through the Auto classes, and as an export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import attnzoo
from attnzoo import GQA, MLA, Linear
from attnzoo.hf import every
from attnzoo.masks import Causal, Dilated, GlobalTokens, PerHead, RandomBlocks, SlidingWindow
from attnzoo.specs import Spec
from tests.hf.conftest import FAMILIES, padding

pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained")

SWAPPED = sorted(set(FAMILIES) - {"gpt_oss"})
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def logits(model, tokens, **inputs):
    with torch.no_grad():
        return model(tokens, **inputs).logits


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2"])
def test_every_other_layer_full_and_the_rest_a_window_is_saved_as_the_stock_family(build, tokens, tmp_path, family):
    model = build(family, num_hidden_layers=4, layer_types=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attnzoo.swap(model, every(2, GQA(1), GQA(1, mask=SlidingWindow(3)), num_layers=4))
    want = logits(model, tokens)
    model.save_pretrained(tmp_path)
    stock, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()) and type(stock).__name__ == type(model).__name__
    assert stock.config.layer_types == ["sliding_attention", "full_attention"] * 2 and stock.config.sliding_window == 3
    torch.testing.assert_close(logits(stock, tokens), want, **CLOSE)
    got = model.generate(tokens, max_new_tokens=6, do_sample=False)
    assert torch.equal(got, stock.generate(tokens, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("specs", ["mechanisms", "heads"])
@pytest.mark.parametrize("family", SWAPPED)
def test_what_no_stock_family_holds_loads_through_the_auto_classes(build, tokens, tmp_path, family, specs):
    model = build(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 4, "layer_types": None})
    lists = {
        "mechanisms": [Linear(feature_map="favor"), MLA(), Linear(1, "hedgehog", window=3), GQA()],
        "heads": [
            GQA(1),
            GQA(mask=SlidingWindow(2) | GlobalTokens(1)),
            GQA(mask=Dilated(2, 2)),
            Linear(decay="retnet"),
        ],
    }
    attnzoo.swap(model, lists[specs])
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.01)
    want = logits(model, tokens)
    mask = padding((12, 7, 4), 12, "left")
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    tokens_want = model.generate(tokens * mask, **options)
    for folder in ("one", "two"):
        model.save_pretrained(tmp_path / folder)
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["model_type"] == f"attnzoo_{family}" and len(config["attnzoo"]["spec"]) == 4
        model, report = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(report.values())
        assert torch.equal(logits(model, tokens), want)
        assert torch.equal(model.generate(tokens * mask, **options), tokens_want)


def test_the_base_model_a_dtype_and_a_config_alone_load_too(build, tokens, tmp_path):
    model = attnzoo.swap(build("llama"), Linear(decay="retnet", normalize=False))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        want = model.model(tokens).last_hidden_state
        base = AutoModel.from_pretrained(tmp_path)
        assert torch.equal(base(tokens).last_hidden_state, want)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert half.model.layers[0].self_attn.log_decay.dtype == torch.float32
    torch.testing.assert_close(logits(half, tokens).float(), logits(model, tokens), atol=0.1, rtol=0.1)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh, tokens), logits(model, tokens))


def test_converting_a_swapped_model_that_no_stock_class_holds_is_refused(build):
    model = attnzoo.swap(build("llama"), Linear())
    with pytest.raises(ValueError, match="no stock class holds"):
        attnzoo.convert(model, GQA(1))


ALONE = """
import sys
for name in ("attnzoo", "recipes"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM

folders = sys.argv[1:]
for folder in folders:
    tokens, mask, want, want_tokens = torch.load(folder + ".pt")
    for again in ("", "-again", "-and-again"):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder + again, trust_remote_code=True, output_loading_info=True
        )
        assert not any(report.values()), report
        with torch.no_grad():
            got = model(tokens).logits
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
        out = model.generate(tokens * mask, attention_mask=mask, max_new_tokens=5, do_sample=False)
        assert torch.equal(out, want_tokens), (folder, out, want_tokens)
        if again != "-and-again":
            model.save_pretrained(folder + ("-again" if again == "" else "-and-again"))
    model.train()(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
print("done", len(folders), model.config._attn_implementation)
"""


def test_an_export_loads_saves_and_loads_again_in_a_process_without_attnzoo(build, tokens, tmp_path):
    window = SlidingWindow(2) | GlobalTokens(1)
    lists = [
        [Linear(feature_map="favor"), MLA(), Linear(1, "hedgehog", window=3), GQA(1)],
        [GQA(1, mask=window), MLA(q_lora_rank=8, mask=Dilated(2, 2)), Linear(decay="retnet"), Linear(normalize=False)],
        [PerHead([SlidingWindow(2), window, Causal(), Dilated(2, 2)])] * 4,
    ]
    folders = []
    mask = padding((12, 7, 4), 12, "left")
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    for number, family in enumerate(["llama", "gpt2", "gpt_neox", "qwen3", "phi3", "gemma2", "mistral"]):
        model = build(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 4, "layer_types": None})
        specs = [spec if isinstance(spec, Spec) else GQA(mask=spec) for spec in lists[number % 3]]
        attnzoo.swap(model, specs)
        folder = attnzoo.hf.export(model, tmp_path / family)
        assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".json", ".py", ".safetensors"]
        out = model.generate(tokens * mask, **options)
        torch.save((tokens, mask, logits(model, tokens), out), f"{folder}.pt")
        folders.append(str(folder))
        ours = AutoModelForCausalLM.from_pretrained(folder)  # here, where attnzoo is
        assert torch.equal(logits(ours, tokens), logits(model, tokens))
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *folders], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done 7 eager" in done.stdout


def test_an_export_of_what_a_stock_class_holds_is_a_stock_folder(build, tokens, tmp_path):
    model = attnzoo.swap(build("llama"), GQA(1))
    folder = attnzoo.hf.export(model, tmp_path / "out")
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is type(model)


def test_an_export_is_refused_before_anything_is_written(build, tmp_path):
    model = attnzoo.swap(build("llama"), GQA(mask=SlidingWindow(2) | RandomBlocks(1, 2)))
    with pytest.raises(ValueError, match="no pattern random_blocks"):
        attnzoo.hf.export(model, tmp_path / "out")
    with pytest.raises(ValueError, match="transformers model"):
        attnzoo.hf.export(torch.nn.Linear(2, 2), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(ValueError, match="there"):
        attnzoo.hf.export(build("llama"), tmp_path / "there", overwrite=True)
