"""Families that no stock class holds with fewer KV heads: their code lies beside the weights and needs no attnzoo."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

import attnzoo
from attnzoo.conversion import Refusal, convert_checkpoint
from attnzoo.conversion.families import family_for
from attnzoo.masks import SlidingWindow
from attnzoo.specs import GQA
from tests.conversion.models import duplicate, generated, logits, tiny, tokens
from tests.conversion.test_checkpoint import load

MODELS = {
    "gpt2": {},
    "gpt2-mistral": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "opt": {},
    "opt-350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 48},
    "opt-bare": {"enable_bias": False, "tie_word_embeddings": False},
    "bloom": {},
    "bloom-post": {"apply_residual_connection_post_layernorm": True},
    "t5": {},
    "t5-v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 1},
}


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch):
    """Where transformers copies the code to, and imports it from."""
    from transformers import dynamic_module_utils

    home = str(tmp_path_factory.getbasetemp() / "modules")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", home)
    monkeypatch.syspath_prepend(home)


def build(name: str, heads: int):
    return duplicate(tiny(name.partition("-")[0], **MODELS[name]), heads)


def padded(model) -> dict[str, torch.Tensor]:
    """A batch whose second row has four tokens of padding on the left."""
    mask = torch.ones_like(tokens())
    mask[1, :4] = 0
    return {"input_ids": tokens() * mask, "attention_mask": mask}


# GPTBigCode holds GPT-2 with one head.
CASES = [(name, heads) for name in MODELS for heads in (1, 2) if (name, heads) != ("gpt2", 1)]


@pytest.mark.parametrize(("name", "heads"), CASES)
def test_the_code_computes_what_duplicated_heads_do_and_caches_fewer(name, heads, tmp_path):
    model = build(name, heads)
    model.save_pretrained(tmp_path / "many", max_shard_size="30KB")
    out = convert_checkpoint(tmp_path / "many", GQA(heads), tmp_path / "few")
    few = load(out, trust_remote_code=True)
    assert few.config.num_key_value_heads == heads and few.config.model_type == f"{model.config.model_type}_gqa"
    for part in model.modules():  # other kernels sum in another order
        if hasattr(part, "config"):
            part.config._attn_implementation = few.config._attn_implementation
    torch.testing.assert_close(logits(few), logits(model), rtol=1e-5, atol=1e-5)
    assert torch.equal(generated(few), generated(model))
    assert torch.equal(generated(few, **padded(model)), generated(model, **padded(model)))
    inputs = {"decoder_input_ids": tokens()} if few.config.is_encoder_decoder else {}
    cache = few(tokens(), use_cache=True, **inputs).past_key_values
    parts = [cache.self_attention_cache, cache.cross_attention_cache] if few.config.is_encoder_decoder else [cache]
    for part in parts:
        assert {layer.keys.shape[1] for layer in part.layers} == {heads}
    for implementation in ("eager", "sdpa") if name.startswith(("opt", "gpt2")) else ():
        few.set_attn_implementation(implementation)
        torch.testing.assert_close(logits(few), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["opt", "bloom", "gpt2", "t5"])
def test_it_converts_again_and_in_memory_to_the_same(name, tmp_path):
    model = build(name, 2)
    model.save_pretrained(tmp_path / "many")
    out = convert_checkpoint(tmp_path / "many", GQA(2), tmp_path / "few")
    few = load(out, trust_remote_code=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = convert_checkpoint(out, GQA(), tmp_path / "same")
    assert torch.equal(logits(load(same, trust_remote_code=True)), logits(few))
    one = load(convert_checkpoint(out, GQA(1), tmp_path / "one"), trust_remote_code=True)
    inside = attnzoo.convert(model, GQA(2), out=tmp_path / "inside")
    inside.set_attn_implementation(few.config._attn_implementation)
    assert torch.equal(logits(inside), logits(few))
    assert torch.equal(logits(load(tmp_path / "inside", trust_remote_code=True)), logits(few))
    twice = attnzoo.convert(few, GQA(1))
    twice.set_attn_implementation(one.config._attn_implementation)
    assert torch.equal(logits(twice), logits(one))
    code = f"modeling_{name}_gqa.py"
    assert {(tmp_path / folder / code).read_bytes() for folder in ("few", "same", "one", "inside")} == {
        family_for(f"{name}_gqa").code.path.read_bytes()
    }


ALONE = """
import json, sys
sys.modules["attnzoo"] = None
import torch, transformers

for folder in sys.argv[1:]:
    inputs, want, text = torch.load(folder + ".pt")
    encoder = json.load(open(folder + "/config.json")).get("is_encoder_decoder")
    auto = transformers.AutoModelForSeq2SeqLM if encoder else transformers.AutoModelForCausalLM
    for again in ("", "-again", "-and-again"):
        model, report = auto.from_pretrained(folder + again, trust_remote_code=True, output_loading_info=True)
        assert not any(report.values()), report
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, want)
        out = model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(out, text)
        model.save_pretrained(folder + {"": "-again", "-again": "-and-again"}.get(again, "-last"))
    model.train()(**inputs, labels=inputs.get("decoder_input_ids", inputs["input_ids"])).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters())
print("done")
"""


def test_it_loads_saves_and_loads_again_in_a_process_without_attnzoo(tmp_path):
    folders = []
    for name in ("opt", "bloom", "gpt2", "t5"):
        model = build(name, 6)
        model.save_pretrained(tmp_path / "many")
        out = convert_checkpoint(tmp_path / "many", GQA(3), tmp_path / name)
        (tmp_path / "many" / "model.safetensors").unlink()
        few = load(out, trust_remote_code=True)
        inputs = {"input_ids": tokens()} | ({"decoder_input_ids": tokens(2)} if name == "t5" else {})
        with torch.no_grad():
            torch.save((inputs, few(**inputs).logits, generated(few)), f"{out}.pt")
        folders.append(str(out))
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *folders], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]


def test_without_trust_nothing_of_it_runs(tmp_path):
    tiny("opt").save_pretrained(tmp_path / "many")
    out = convert_checkpoint(tmp_path / "many", GQA(2), tmp_path / "few")
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_opt_gqa.OPTGQAForCausalLM"
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)


@pytest.mark.parametrize(
    ("name", "changes", "spec", "says"),
    [
        ("opt", {"architectures": ["OPTForQuestionAnswering"]}, GQA(2), "OPTForCausalLM alone"),
        ("bloom", {"architectures": ["BloomModel"]}, GQA(1), "BloomForCausalLM alone"),
        ("t5", {"architectures": ["T5ForTokenClassification"]}, GQA(1), "T5ForConditionalGeneration alone"),
        ("bloom", {}, GQA(2, mask=SlidingWindow(4)), "sliding window"),
        ("t5", {}, [GQA(1), GQA(2)], "one number of KV heads"),
    ],
)
def test_what_the_code_has_not_is_refused_and_nothing_is_written(name, changes, spec, says, tmp_path):
    tiny(name).save_pretrained(tmp_path / "many")
    path = tmp_path / "many" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(Refusal, match=says):
        convert_checkpoint(tmp_path / "many", spec, tmp_path / "few")
    assert [path.name for path in tmp_path.iterdir()] == ["many"]


def test_t5_keeps_its_encoder_and_relative_positions_bit_for_bit(tmp_path):
    model = tiny("t5")
    model.save_pretrained(tmp_path / "many")
    few = load(convert_checkpoint(tmp_path / "many", GQA(1), tmp_path / "few"), trust_remote_code=True)
    before, after = model.state_dict(), few.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    paths = [f"decoder.block.{layer}.layer.{kind}" for layer in range(2) for kind in range(2)]
    kinds = ("SelfAttention", "EncDecAttention")
    assert changed == {f"{path}.{kinds[int(path[-1])]}.{part}.weight" for path in paths for part in "kv"}


def test_t5_without_a_decoder_is_refused():
    config = tiny("t5").config.to_dict() | {"is_encoder_decoder": False}
    with pytest.raises(ValueError, match="encoder alone"):
        family_for("t5").geometry(config)
