"""Families whose fewer KV heads another class holds: what comes out computes what came in, and loads by itself."""

import json

import pytest
import torch
from transformers import AutoModel

import attnzoo
from attnzoo.conversion import ConversionError, Refusal, convert_checkpoint
from attnzoo.conversion.families import family_for
from attnzoo.specs import GQA
from tests.conversion.models import duplicate, generated, logits, tiny, tokens
from tests.conversion.test_checkpoint import load

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# Sequential residuals, whose norms need no folding.
SEQUENTIAL = {"use_parallel_residual": False, "rotary_pct": 1.0}
HOLDERS = [
    ("gpt_neox", {"hidden_act": "relu"}, "PhiForCausalLM"),
    ("gpt_neox", {"attention_bias": False, "rotary_pct": 0.75, "tie_word_embeddings": True}, "PhiForCausalLM"),
    ("gpt_neox", SEQUENTIAL, "Starcoder2ForCausalLM"),
    ("gpt_neox", SEQUENTIAL | {"attention_bias": False}, "Starcoder2ForCausalLM"),
    ("gptj", {}, "PhiForCausalLM"),
    ("gptj", {"rotary_dim": 8, "n_inner": 50, "tie_word_embeddings": True}, "PhiForCausalLM"),
]


@pytest.mark.parametrize(("model_type", "changes", "holder"), HOLDERS)
@pytest.mark.parametrize("heads", [1, 2])
def test_another_class_holds_what_duplicated_heads_compute(model_type, changes, holder, heads, tmp_path):
    model = duplicate(tiny(model_type, **changes), heads)
    model.save_pretrained(tmp_path / "many", max_shard_size="30KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    few = load(convert_checkpoint(tmp_path / "many", GQA(heads), tmp_path / "few"))
    assert type(few).__name__ == holder and few.config.num_key_value_heads == heads
    torch.testing.assert_close(logits(few), logits(model), **CLOSE)
    assert torch.equal(generated(few), generated(model))
    cache = few(tokens()).past_key_values
    assert cache.layers[0].keys.shape[1] == heads
    again = load(convert_checkpoint(tmp_path / "few", GQA(), tmp_path / "again"))
    assert torch.equal(logits(again), logits(few))
    inside = attnzoo.convert(model, GQA(heads))
    inside.set_attn_implementation(few.config._attn_implementation)
    assert type(inside) is type(few) and torch.equal(logits(inside), logits(few))


@pytest.mark.parametrize("model_type", ["gpt_neox", "gptj"])
def test_the_base_model_alone_becomes_the_base_model(model_type, tmp_path):
    model = duplicate(tiny(model_type), 2)
    model.base_model.save_pretrained(tmp_path / "many")
    few = AutoModel.from_pretrained(convert_checkpoint(tmp_path / "many", GQA(2), tmp_path / "few"))
    assert type(few).__name__ == "PhiModel"
    with torch.no_grad():
        want = model.base_model(tokens()).last_hidden_state
        torch.testing.assert_close(few(tokens()).last_hidden_state, want, **CLOSE)


def test_configs_of_older_transformers_are_understood(tmp_path):
    """The hub's GPT-NeoX say rotary_pct and rotary_emb_base, and leave out what the class has for them."""
    model = duplicate(
        tiny("gpt_neox", rotary_pct=0.5, rope_parameters={"rope_type": "default", "rope_theta": 500.0}), 2
    )
    model.save_pretrained(tmp_path / "many")
    path = tmp_path / "many" / "config.json"
    config = json.loads(path.read_text())
    part, theta = (config["rope_parameters"][key] for key in ("partial_rotary_factor", "rope_theta"))
    for key in ("rope_parameters", "hidden_act", "layer_norm_eps", "use_parallel_residual", "attention_dropout"):
        del config[key]
    path.write_text(json.dumps(config | {"rotary_pct": part, "rotary_emb_base": theta}))
    assert torch.equal(logits(load(tmp_path / "many")), logits(model))
    few = load(convert_checkpoint(tmp_path / "many", GQA(2), tmp_path / "few"))
    torch.testing.assert_close(logits(few), logits(model), **CLOSE)


def test_half_precision_stays_and_costs_one_rounding(tmp_path):
    model = duplicate(tiny("gpt_neox", dtype=torch.bfloat16), 2)
    model.save_pretrained(tmp_path / "many")
    few = load(convert_checkpoint(tmp_path / "many", GQA(2), tmp_path / "few"), dtype="auto")
    assert {parameter.dtype for parameter in few.parameters()} == {torch.bfloat16}
    exact = logits(model.float())
    error = (logits(few.float()) - exact).norm() / exact.norm()
    assert error < 2 * torch.finfo(torch.bfloat16).eps


def test_what_the_other_class_has_not_is_refused():
    odd = {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.7}}
    for changes in ({"use_parallel_residual": False}, {"architectures": ["GPTNeoXForQuestionAnswering"]}, odd):
        with pytest.raises(Refusal, match="Phi"):
            family_for("gpt_neox").with_kv_heads(tiny("gpt_neox").config.to_dict() | changes, 2)
    with pytest.raises(ConversionError, match="rotary_dim"):
        family_for("gptj").with_kv_heads(tiny("gptj").config.to_dict() | {"rotary_dim": 10}, 2)
