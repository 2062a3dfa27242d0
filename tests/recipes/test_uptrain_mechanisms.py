"""The main job with every mechanism: what is converted can be trained, and what was trained is a folder that loads."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from recipes import build, export
from recipes.models import load_model, load_tokenizer
from recipes.run_folder import RunFolder
from recipes.uptrain import uptrain
from tests.support.recipes import Tiny

LATENT = ("attention=mla", "attention.kv_lora_rank=8", "attention.qk_rope_head_dim=4")
WITHOUT_ATTNZOO = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("attnzoo", "recipes"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
expected = torch.load({expected!r}, weights_only=True)
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code={trust})
assert model.config.model_type == {model_type!r}, model.config.model_type
difference = (model(expected["tokens"]).logits - expected["logits"]).abs().max().item()
assert difference <= {tolerance}, difference
AutoTokenizer.from_pretrained({folder!r})
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Tiny(tmp_path_factory.mktemp("tiny"))


def run(tiny, folder, *overrides):
    made = RunFolder(folder)
    uptrain(tiny.config("convert=auto", "optimizer.weight_decay=0.1", *overrides), made)
    report = json.loads((made.path / "report.json").read_text())
    return made, {row["name"]: row for row in report["evaluations"]}


def assert_loads(tiny, made, folder, *, model_type, trust, tolerance=1e-5):
    """The last checkpoint's weights give the same logits as the exported folder where attnzoo is not installed."""
    model = load_model({**tiny.config().model, "path": str(made.converted)})
    weights = load_file(next(made.checkpoints.glob("*/*.safetensors")))
    prefix = "/state_dict/model."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    tokens = torch.randint(0, 62, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.save({"tokens": tokens, "logits": model.eval()(tokens).logits}, folder / "expected.pt")
    script = WITHOUT_ATTNZOO.format(
        expected=str(folder / "expected.pt"),
        folder=str(made.uptrained),
        trust=trust,
        model_type=model_type,
        tolerance=tolerance,
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("objective", ["mixture", "layers"])
def test_latent_attention_trains_without_its_norm_and_ends_as_stock_deepseek(tiny, tmp_path, objective):
    made, found = run(
        *(tiny, tmp_path / "run", *LATENT, f"objective={objective}", "max_steps=12", "optimizer.lr=0.003"),
    )
    start = load_file(made.converted / "model.safetensors")
    rows = start["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    assert rows.abs().max() > 1e-3, "rows scaled down for a norm would be lost at the first step of AdamW"
    stock = load_file(made.uptrained / "model.safetensors")
    assert stock["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"][:8].abs().max() < 1e-6
    assert found["uptrained"]["kv_bytes_per_token"] == found["original"]["kv_bytes_per_token"] * 12 / 32
    if objective == "mixture":
        assert found["uptrained"]["cross_entropy"] < found["converted"]["cross_entropy"]
    assert_loads(tiny, made, tmp_path, model_type="deepseek_v3", trust=False, tolerance=1e-3)


def test_linear_attention_beside_softmax_trains_and_comes_with_its_code(tiny, tmp_path):
    stages = "stages={maps: {max_steps: 2, objective: {layers: {}}, train: ['*.learned_map.*', '*.window_factors']}, "
    stages += "all: {objective: {kl: {}, ce: {}}}}"
    made, found = run(
        *(tiny, tmp_path / "run", "attention=linear", "attention.window=8", "convert.layers=[1]", stages),
        *("max_steps=8", "model.attn_implementation=sdpa"),
    )
    config = json.loads((made.uptrained / "config.json").read_text())
    assert [layer["mechanism"] for layer in config["attnzoo"]["layers"]] == ["gqa", "linear"]
    assert found["uptrained"]["cross_entropy"] < found["converted"]["cross_entropy"]
    assert_loads(tiny, made, tmp_path, model_type="attnzoo_llama", trust=True)


def test_a_window_beside_kept_layers_trains_as_a_stock_class(tiny, tmp_path):
    made, found = run(
        *(tiny, tmp_path / "run", "attention=window", "attention.mask.window=8", "convert.layers=[1]", "objective=kl"),
    )
    assert found["uptrained"]["kv_bytes_per_token"] < found["original"]["kv_bytes_per_token"]
    assert_loads(tiny, made, tmp_path, model_type="ministral", trust=False)


def test_a_mask_that_no_stock_class_has_goes_into_all_layers_and_comes_with_its_code(tiny, tmp_path):
    made, found = run(tiny, tmp_path / "run", "attention=window_sinks", "attention.mask.first.window=6", "objective=kl")
    config = json.loads((made.uptrained / "config.json").read_text())
    assert [layer["mask"]["pattern"] for layer in config["attnzoo"]["layers"]] == ["or", "or"]
    assert found["converted"]["cross_entropy"] != found["original"]["cross_entropy"]
    assert_loads(tiny, made, tmp_path, model_type="attnzoo_llama", trust=True)


def test_a_folder_that_is_for_use_and_a_method_for_heads_are_refused(tiny, tmp_path):
    import attnzoo

    attnzoo.convert(tiny.model, attnzoo.MLA(kv_lora_rank=8, qk_rope_head_dim=4), out=tmp_path / "stock")
    with pytest.raises(ValueError, match=r"for use and not for training\. Give the model that it was made from"):
        run(tiny, tmp_path / "run", f"model.path={tmp_path / 'stock'}", "attention=original")
    for attention in ("mla", "linear", "window"):
        with pytest.raises(ValueError, match=r"convert\.method is 'mean'.*take convert=auto"):
            uptrain(tiny.config("convert=mean", f"attention={attention}"), RunFolder(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_factors_of_latent_attention_are_balanced_without_a_change_of_the_logits(tiny):
    import attnzoo
    from recipes.balance import balance

    model = attnzoo.convert(load_model(tiny.config().model), attnzoo.MLA(kv_lora_rank=8, qk_rope_head_dim=4)).double()
    tokens = torch.randint(0, 62, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens).logits
        balance(model)
        torch.testing.assert_close(model(tokens).logits, before, atol=1e-6, rtol=1e-6)
    for layer in model.model.layers:
        attention = layer.self_attn
        down, up = attention.kv_a_proj_with_mqa.weight, attention.kv_b_proj.weight
        torch.testing.assert_close(down[:8].square().mean(1), up.square().mean(0), atol=0, rtol=1e-5)
        keys = down[8:].unflatten(0, (2, 2)).square().mean((0, 2))
        queries = attention.q_proj.weight.unflatten(0, (4, -1))[:, -4:].unflatten(1, (2, 2)).square().mean((0, 1, 3))
        torch.testing.assert_close(keys, queries, atol=0, rtol=1e-5)


def test_stored_probabilities_are_made_once_for_runs_with_other_seeds_and_batches(tiny, tmp_path, monkeypatch):
    loaded = []

    def counted(*args, original=build.build_teacher):
        loaded.append(args)
        return original(*args)

    monkeypatch.setattr(build, "build_teacher", counted)
    common = ["objective=kl_topk", "objective.kl_topk.k=8", f"teacher.cache={tmp_path / 'store'}", "max_steps=20"]
    made, found = run(tiny, tmp_path / "first", *common)
    assert len(loaded) == 1
    assert found["uptrained"]["cross_entropy"] < found["converted"]["cross_entropy"]
    assert not list((made.path).glob("**/*teacher*"))
    run(tiny, tmp_path / "second", *common, "seed=1", "batch.size=1", "batch.accumulate=2", "max_steps=10")
    assert len(loaded) == 1
    with pytest.raises(ValueError, match="k: 8 there, 4 now"):
        run(tiny, tmp_path / "third", *common, "objective.kl_topk.k=4")


@pytest.mark.parametrize("other", [False, True], ids=["rounding", "another function"])
def test_logits_that_differ_by_rounding_alone_are_exported_and_others_are_not(tiny, tmp_path, monkeypatch, other):
    made, _ = run(tiny, tmp_path / "run", *LATENT, "max_steps=1")
    model = load_model({**tiny.config().model, "path": str(made.converted)})
    exact, calls = export._logits, []

    def rounded(one):
        """In float32 each call errs by as much as all of the logits; in float64 only another function does."""
        calls.append(one.dtype)
        logits = exact(one)
        return logits * len(calls) if other or one.dtype == torch.float32 else logits

    monkeypatch.setattr(export, "_logits", rounded)
    tokenizer = load_tokenizer({"path": str(tiny.model), "trust_remote_code": False})
    if other:
        with pytest.raises(export.ExportDiffers, match="its logits differ"):
            export.export(model, tokenizer, tmp_path / "out", dtype="float32")
        assert not (tmp_path / "out").exists()
    else:
        export.export(model, tokenizer, tmp_path / "out", dtype="float32")
        assert (tmp_path / "out" / "config.json").is_file()
    assert calls == [torch.float32] * 2 + [torch.float64] * 2
