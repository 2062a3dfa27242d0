"""Models converted to latent attention: in memory, as stock deepseek_v3, and from folder to folder."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

import attnzoo
from attnzoo import GQA, MLA
from attnzoo.conversion import ConversionError, Refusal
from attnzoo.hf.latent import SwappedLatentAttention
from attnzoo.hf.latent_stock import as_deepseek
from attnzoo.masks import SlidingWindow

pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained")

FULL = MLA(kv_lora_rank=24, qk_rope_head_dim=24, rope_frequencies=(0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3))
PART = MLA(kv_lora_rank=18, qk_rope_head_dim=4, rope_frequencies=(1, 3))
SPECS = {"half": MLA(), "full": FULL, "part": PART, "twice": MLA(kv_lora_rank=20, qk_rope_head_dim=12)}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def build(family="llama", dtype=torch.float32, **changes):
    """A tiny model whose layers matter."""
    import transformers

    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma": "Gemma"}[family]
    torch.manual_seed(0)
    if family == "mistral":
        changes = {"sliding_window": None} | changes
    config = getattr(transformers, f"{name}Config")(**(SIZES | changes))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data *= 4
        elif name.endswith("bias"):
            parameter.data.normal_()
    return model.to(dtype)


@pytest.fixture
def tokens():
    return torch.randint(2, 97, (3, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, tokens, **inputs):
    return model(tokens, **inputs).logits


def greedy(model, tokens, mask):
    return model.generate(tokens * mask, attention_mask=mask, max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_stock_model_is_the_same_function_with_a_latent_cache(family, spec, tokens, tmp_path):
    model = attnzoo.convert(build(family, tie_word_embeddings=family == "llama"), spec)
    as_deepseek(model).save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(stock).__name__ == "DeepseekV3ForCausalLM"
    torch.testing.assert_close(logits(stock, tokens), logits(model, tokens), atol=1e-5, rtol=0)
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    assert torch.equal(greedy(stock, tokens, mask), greedy(model, tokens, mask))
    cache = DynamicCache(config=stock.config)
    logits(stock, tokens, past_key_values=cache)
    sizes = model.model.layers[0].self_attn.spec
    assert cache.layers[1].keys.shape == (3, 1, 20, sizes.kv_lora_rank)
    assert cache.layers[1].values.shape == (3, 1, 20, sizes.qk_rope_head_dim)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_full_rank_gives_the_model_itself_with_every_method(family, calibrated, tokens):
    model = build(family)
    want = logits(model, tokens)
    for method in ("svd", "refit", "regress") if calibrated else ("svd",):
        made = attnzoo.convert(model, FULL, method=method, calibration=tokens if calibrated else None)
        torch.testing.assert_close(logits(made, tokens), want, atol=1e-4, rtol=0)
        torch.testing.assert_close(logits(as_deepseek(made), tokens), want, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(model, tokens), want, atol=0, rtol=0)


@pytest.mark.parametrize("rope", ["llama3", "linear", "yarn"])
@pytest.mark.parametrize("spec", [FULL, PART, MLA(qk_rope_head_dim=8, kv_lora_rank=16)], ids=["full", "part", "once"])
def test_scaled_frequencies_are_kept(rope, spec, tokens):
    scaling = {"rope_type": rope, "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
    if rope == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = build(rope_parameters=scaling)
    made = attnzoo.convert(model, spec)
    torch.testing.assert_close(logits(as_deepseek(made), tokens), logits(made, tokens), atol=1e-5, rtol=0)
    if spec is FULL:
        torch.testing.assert_close(logits(made, tokens), logits(model, tokens), atol=1e-4, rtol=0)


def test_frequencies_that_change_with_the_text_are_held_only_all_at_once(tokens):
    model = build(rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0})
    made = attnzoo.convert(model, MLA(qk_rope_head_dim=8, kv_lora_rank=16))
    torch.testing.assert_close(logits(as_deepseek(made), tokens), logits(made, tokens), atol=1e-5, rtol=0)
    with pytest.raises(Refusal, match="change with the text's length"):
        as_deepseek(attnzoo.convert(model, PART))


def test_half_precision_rounds_no_more_in_the_stock_model(tokens):
    truth = logits(attnzoo.convert(build(), SPECS["half"]), tokens)
    made = attnzoo.convert(build(dtype=torch.bfloat16), SPECS["half"])
    errors = [(logits(m, tokens).float() - truth).square().mean().sqrt() for m in (made, as_deepseek(made))]
    assert errors[1] < 1.5 * errors[0]
    with pytest.raises(Refusal, match="float16"):
        as_deepseek(made.half())


def test_a_folder_becomes_a_stock_folder_that_needs_no_attnzoo(tokens, tmp_path):
    model = build("qwen2", torch.bfloat16, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "old", max_shard_size="30KB")
    (tmp_path / "old" / "tokenizer.json").write_text("{}")
    out = attnzoo.convert(tmp_path / "old", SPECS["half"], calibration=tokens, method="svd", out=tmp_path / "new")
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3" and config["attnzoo"]["spec"]["mechanism"] == "mla"
    assert config["attnzoo"]["method"] == "svd"
    assert (out / "tokenizer.json").exists() and not list(out.glob("*.py")) and "auto_map" not in config
    assert all(t.dtype == torch.bfloat16 for file in out.glob("*.safetensors") for t in load_file(file).values())
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "options = {'dtype': torch.float32, 'output_loading_info': True}\n"
        f"model, info = AutoModelForCausalLM.from_pretrained({str(out)!r}, **options)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        f"torch.save(model(torch.tensor({tokens.tolist()})).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
        "assert not [name for name in sys.modules if name.startswith('attnzoo')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    here = attnzoo.convert(model.float(), SPECS["half"], calibration=tokens, method="svd")
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(here, tokens), atol=0.1, rtol=0)
    with pytest.raises(ValueError, match="exists"):
        attnzoo.convert(tmp_path / "old", SPECS["half"], out=out)


def test_a_folder_of_the_base_model_alone_is_refused(tmp_path):
    build().model.save_pretrained(tmp_path / "old")
    with pytest.raises(ConversionError, match="base model alone"):
        attnzoo.convert(tmp_path / "old", MLA(), out=tmp_path / "new")


def test_a_large_result_is_written_in_parts_with_an_index(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("attnzoo.hf.latent_folder._SHARD", 40_000)
    model = build()
    model.save_pretrained(tmp_path / "old")
    out = attnzoo.convert(tmp_path / "old", PART, out=tmp_path / "new")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {file.name: load_file(file) for file in out.glob("*.safetensors")}
    assert len(files) > 3 and {name: file for file, held in files.items() for name in held} == index["weight_map"]
    stock = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(stock, tokens), logits(attnzoo.convert(model, PART), tokens), atol=1e-5, rtol=0)


def test_a_converted_model_trains_saves_and_becomes_stock_after(tokens, tmp_path):
    model = attnzoo.convert(build("qwen2"), SPECS["half"], out=tmp_path / "before").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(5):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert isinstance(again.model.layers[0].self_attn, SwappedLatentAttention)
    torch.testing.assert_close(logits(as_deepseek(again), tokens), logits(model, tokens), atol=1e-5, rtol=0)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "before")
    assert (logits(before, tokens) - logits(model, tokens)).abs().max() > 0.01


def test_the_text_chooses_the_frequencies_the_same_for_all_layers(tokens):
    model = build()
    for layer in model.model.layers:  # nothing asks for the fastest frequency
        layer.self_attn.q_proj.weight.data.view(6, 8, 48)[:, [0, 4]] = 0
    spec = MLA(kv_lora_rank=12, qk_rope_head_dim=6)
    chosen = [
        layer.self_attn.spec.rope_frequencies for layer in attnzoo.convert(model, spec, calibration=tokens).model.layers
    ]
    assert chosen[0] == chosen[1] and 0 not in chosen[0]
    without = attnzoo.convert(model, spec).model.layers[0].self_attn.spec.rope_frequencies
    assert without == (0, 1, 2)


def test_each_method_comes_nearer_to_the_original_on_the_text(tokens):
    model = build()
    text = torch.randint(2, 97, (24, 20), generator=torch.Generator().manual_seed(3))
    errors = []
    for method, calibration in (("svd", None), ("svd", text), ("refit", text), ("regress", text)):
        made = attnzoo.convert(model, MLA(kv_lora_rank=12, qk_rope_head_dim=6), method=method, calibration=calibration)
        errors.append((logits(made, text) - logits(model, text)).square().mean())
    assert errors[1] < errors[0] and errors[2] < errors[1] and errors[3] < errors[2]


@pytest.mark.parametrize(
    ("family", "changes", "spec", "message"),
    [
        ("gemma", {}, MLA(), "of llama, mistral, qwen2, qwen3 it has"),
        ("llama", {"mlp_bias": True}, MLA(), "no biases"),
        ("mistral", {"sliding_window": 8}, MLA(), "no sliding window"),
        ("llama", {}, MLA(mask=SlidingWindow(4)), "causal mask only"),
        ("llama", {}, MLA(q_lora_rank=8), "low rank"),
        ("llama", {}, [MLA(kv_lora_rank=8), MLA(kv_lora_rank=9)], "layers are alike"),
        ("llama", {}, [MLA(), GQA()], "must be an MLA"),
    ],
)
def test_what_the_stock_class_does_not_hold_is_refused_by_name(family, changes, spec, message, tmp_path):
    model = build(family, **changes)
    model.save_pretrained(tmp_path / "old")
    with pytest.raises(ConversionError, match=message):
        attnzoo.convert(tmp_path / "old", spec, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    if message != "must be an MLA":
        made = attnzoo.convert(model, spec)  # in memory it is held
        with pytest.raises(Refusal, match=message):
            as_deepseek(made)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": torch.zeros(2, 3)}, "calibration must be token ids"),
        ({"calibration": ["text"]}, "calibration must be token ids"),
        ({"method": "mean"}, "method for an MLA"),
        ({"method": "refit"}, "needs calibration text"),
    ],
)
def test_bad_requests_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        attnzoo.convert(build(), MLA(), **options)
    with pytest.raises(ValueError, match="must have latent attention"):
        as_deepseek(build())
    with pytest.raises(Refusal, match="in 1 of 2"):
        as_deepseek(attnzoo.swap(copy.deepcopy(build()), [MLA(), GQA()]))


def test_the_damage_is_measured_on_text_that_was_held_out(tokens, tmp_path):
    told = []
    model = build("qwen2", torch.bfloat16)
    options = {"held_out": tokens, "report": told.append}
    attnzoo.convert(model, FULL, calibration=tokens.flip(0), **options)
    model.save_pretrained(tmp_path / "old")
    attnzoo.convert(tmp_path / "old", PART, out=tmp_path / "new", **options)
    exact, lossy = told
    assert exact.held_out and exact.kl < 1e-3 < lossy.kl and exact.tokens == 3 * 19
    assert exact.kv_bytes_before == 2 * 2 * 2 * 3 * 8 and lossy.kv_bytes == 2 * 2 * (18 + 4)
