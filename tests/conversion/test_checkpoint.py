"""Folder to folder, read back by stock transformers."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig

from attnzoo.conversion import METHODS, convert_checkpoint, merge_heads
from attnzoo.conversion.families import family_for
from attnzoo.masks import Causal, SlidingWindow
from attnzoo.specs import GQA
from tests.conversion.models import CONFIGS, HELD_ELSEWHERE, duplicate, generated, logits, tiny, tokens

FEWER = sorted(set(CONFIGS) - set(HELD_ELSEWHERE))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """One saved model a family, made when it is first asked for."""
    made: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(model_type)
            tiny(model_type).save_pretrained(made[model_type])
        return made[model_type]

    return folder


def load(folder: Path, **kwargs):
    """The stock model, after a check that every tensor found its place and none was left over."""
    encoder = json.loads((folder / "config.json").read_text()).get("is_encoder_decoder")
    auto = AutoModelForSeq2SeqLM if encoder else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model.eval()


def headers(folder: Path) -> dict[str, dict[str, str]]:
    """file -> tensor -> dtype"""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["format"] == "pt"
            found[path.name] = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return found


def pooled(model, num_kv_heads: int, method: str = "mean", seed: int = 0):
    """The state dict of `model` with its heads merged layer by layer, for a stock model of that many KV heads."""
    family = family_for(model.config.model_type)
    geometry = family.geometry(model.config.to_dict())
    config = family.with_kv_heads(model.config.to_dict(), num_kv_heads)
    fewer = type(model)(type(model.config).from_dict(config))
    fewer.load_state_dict({k: v for k, v in model.state_dict().items() if not family.locate(k)}, strict=False)
    for layer in range(geometry.num_layers):
        path = family.attention_path(layer)
        projections = family.split(model.get_submodule(path).state_dict(), geometry)
        merged = merge_heads(projections, num_kv_heads, method, seed, layer=layer)
        target = family.geometry(config)
        fewer.get_submodule(path).load_state_dict(family.join(merged, target))
    for parameter in fewer.parameters():  # not .to(dtype), which would round the frequencies of RoPE too
        parameter.data = parameter.data.to(model.dtype)
    return fewer.eval()


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_as_many_heads_as_before_change_no_logit(model_type, folders, tmp_path):
    before = load(folders(model_type))
    for heads in (None, 6):
        out = convert_checkpoint(folders(model_type), GQA(heads), tmp_path / f"out{heads}", method="random")
        after = load(out)
        assert torch.equal(logits(after), logits(before))
        state = after.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in before.state_dict().items())


@pytest.mark.parametrize("model_type", FEWER)
def test_fewer_heads_load_in_the_stock_class_and_equal_a_model_pooled_by_hand(model_type, folders, tmp_path):
    out = convert_checkpoint(folders(model_type), GQA(2), tmp_path / "out")
    model = load(out)
    assert model.config.model_type == model_type
    assert family_for(model_type).geometry(model.config.to_dict()).num_kv_heads == 2
    assert torch.equal(logits(model), logits(pooled(load(folders(model_type)), 2)))
    assert generated(model).shape == (2, 22)
    assert headers(out).keys() == headers(folders(model_type)).keys()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_writes_what_merge_heads_gives(method, folders, tmp_path):
    out = convert_checkpoint(folders("qwen2"), GQA(3), tmp_path / "out", method=method, seed=5)
    assert torch.equal(logits(load(out)), logits(pooled(load(folders("qwen2")), 3, method, seed=5)))


@pytest.mark.parametrize("model_type", [*FEWER, "gpt2", "gpt_bigcode"])
def test_heads_that_were_duplicated_come_back_under_mean(model_type, tmp_path):
    """A model whose heads are equal in groups loses nothing but the copies."""
    heads = 2 if model_type in FEWER else 1
    model = duplicate(tiny(model_type), heads)
    model.save_pretrained(tmp_path / "many")
    out = convert_checkpoint(tmp_path / "many", GQA(heads), tmp_path / "out")
    after = load(out)
    # The weights are equal bit for bit (test_merge); the sums of smaller matrices are ordered differently.
    torch.testing.assert_close(logits(after), logits(model), rtol=1e-5, atol=1e-5)
    again = convert_checkpoint(out, GQA(heads), tmp_path / "again")
    for name, tensor in load(again).state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_with_one_head_becomes_gpt_bigcode(tied, folders, tmp_path):
    source = tmp_path / "source"
    # The files on the hub: names of the base model alone, and its causal mask stored among the weights.
    model = tiny("gpt2", tie_word_embeddings=tied, n_inner=50)
    model.save_pretrained(source)
    if tied:
        model.transformer.save_pretrained(source)
        config = json.loads((source / "config.json").read_text())
        config["architectures"] = ["GPT2LMHeadModel"]
        (source / "config.json").write_text(json.dumps(config))
        from safetensors.torch import load_file, save_file

        tensors = load_file(source / "model.safetensors")
        assert "h.0.attn.c_attn.weight" in tensors
        mask = torch.zeros(1, 1, 64, 64).masked_fill(~Causal().dense(64, 64), float("-inf"))
        tensors |= {f"h.{i}.attn.bias": mask.clone() for i in range(2)}
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
        same = load(convert_checkpoint(source, GQA(), tmp_path / "same"))
        assert torch.equal(logits(same), logits(model))
    one = load(convert_checkpoint(source, GQA(1), tmp_path / "one"))
    assert one.config.model_type == "gpt_bigcode" and one.config.num_key_value_heads == 1
    assert one.config.architectures == ["GPTBigCodeForCausalLM"] and one.config.activation_function == "gelu_new"
    assert one.transformer.h[0].attn.c_attn.weight.shape == (48 + 2 * 8, 48)
    # The same weights as a GPT-2 that holds its one head six times over.
    family, geometry = family_for("gpt2"), family_for("gpt2").geometry(model.config.to_dict())
    for layer in range(2):
        attention = model.get_submodule(family.attention_path(layer))
        p = merge_heads(family.split(attention.state_dict(), geometry), 1)
        for name in ("k", "v", "k_bias", "v_bias"):
            object.__setattr__(p, name, getattr(p, name).repeat_interleave(6, dim=0))
        attention.load_state_dict(family.join(p, geometry))
    torch.testing.assert_close(logits(one), logits(model), rtol=1e-5, atol=1e-5)
    assert one.generate(tokens(), max_new_tokens=4, eos_token_id=None).shape == (2, 21)


@pytest.mark.parametrize("model_type", ["qwen2", "phi3"])
def test_shards_stay_shards_and_the_index_is_right(model_type, tmp_path):
    model = tiny(model_type, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source", max_shard_size="12KB")
    before = headers(tmp_path / "source")
    assert len(before) > 4
    layers = [{name.split(".")[2] for name in names if "self_attn" in name} for names in before.values()]
    assert any("0" in a and "0" in b for a, b in pairwise(layers)), "no layer lies in two shards"
    out = convert_checkpoint(tmp_path / "source", GQA(2), tmp_path / "out")
    assert headers(out) == before  # files, names and dtypes
    index = json.loads((out / "model.safetensors.index.json").read_text())
    after = load(out, dtype="auto")
    assert index["weight_map"] == {name: file for file, names in before.items() for name in names}
    parameters = {p.data_ptr(): p for p in after.parameters()}.values()
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in parameters)
    assert index["metadata"]["total_parameters"] == sum(p.numel() for p in parameters)
    assert after.dtype == torch.bfloat16
    assert torch.equal(logits(after), logits(pooled(load(tmp_path / "source", dtype="auto"), 2)))


def test_every_tensor_keeps_its_own_dtype(tmp_path):
    model = tiny("qwen3")
    for number, parameter in enumerate(model.parameters()):
        parameter.data = parameter.data.to([torch.float32, torch.bfloat16, torch.float16, torch.float64][number % 4])
    model.save_pretrained(tmp_path / "source")
    out = convert_checkpoint(tmp_path / "source", GQA(1), tmp_path / "out")
    assert headers(out) == headers(tmp_path / "source")
    assert len(set(headers(out)["model.safetensors"].values())) == 4


def test_what_is_not_weights_comes_along_and_code_does_not(tmp_path):
    source = tmp_path / "source"
    model = tiny("qwen2")
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=2)
    model.save_pretrained(source)
    assert "lm_head.weight" not in headers(source)["model.safetensors"]  # tied, so stored once
    along = [
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "LICENSE",
        "NOTICE",
    ]
    along.append("tokenizer.model.v3")
    left = [
        "README.md",
        "modeling_own.py",
        "tokenizer_own.py",
        "optimizer.pt",
        "training_args.bin",
        "trainer_state.json",
        "model.onnx",
    ]
    for name in along + left + [".hidden.json.swp", "pytorch_model.bin.index.json"]:
        (source / name).write_bytes(name.encode())
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ x }}")
    (source / "runs").mkdir()
    config = json.loads((source / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}, "extra": {"kept": [1, "ü"]}}
    (source / "config.json").write_text(json.dumps(config))

    with pytest.warns(UserWarning, match=r"code of its own \(AutoModelForCausalLM\).*qwen2"):
        out = convert_checkpoint(source, GQA(2), tmp_path / "out", method="random", seed=9)
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    own = {"config.json", "generation_config.json", "model.safetensors", "additional_chat_templates/rag.jinja"}
    assert found == {*along, *own}
    for name in along:
        assert (out / name).read_bytes() == name.encode()
    after = load(out)
    assert after.generation_config.max_new_tokens == 7
    assert after.lm_head.weight.data_ptr() == after.model.embed_tokens.weight.data_ptr()
    expected = config | {"num_key_value_heads": 2}
    del expected["auto_map"]
    record = {"spec": GQA(2).to_dict(), "method": "random", "seed": 9, "source": "source"}
    assert json.loads((out / "config.json").read_text()) == expected | {"attnzoo": record}
    again = convert_checkpoint(out, GQA(1), tmp_path / "again")
    twice = json.loads((again / "config.json").read_text())["attnzoo"]
    assert twice["before"] == record and twice["method"] == "mean"
    load(again).save_pretrained(tmp_path / "resaved")
    assert json.loads((tmp_path / "resaved" / "config.json").read_text())["attnzoo"] == twice


def test_a_mask_goes_into_the_config_where_the_class_has_it(folders, tmp_path):
    spec = GQA(2, mask=SlidingWindow(3))
    out = load(convert_checkpoint(folders("mistral"), [spec, spec], tmp_path / "out"))
    assert out.config.sliding_window == 3 and out.config.attnzoo["spec"] == spec.to_dict()
    assert not torch.equal(logits(out), logits(pooled(load(folders("mistral")), 2)))
    causal = load(convert_checkpoint(folders("mistral"), GQA(mask=Causal()), tmp_path / "causal"))
    assert causal.config.sliding_window is None
