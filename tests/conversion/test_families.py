import pytest
import torch
from transformers import AutoModelForCausalLM

import attnzoo
from attnzoo.conversion import convert_checkpoint
from attnzoo.conversion.families import ConversionError, Refusal, UnknownFamily, family_for, known
from attnzoo.masks import Causal, Full, SlidingWindow
from attnzoo.specs import GQA
from tests.conversion.models import CONFIGS, duplicate, logits, tiny


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request):
    return tiny(request.param)


def attention_tensors(model, layer):
    """(family, geometry, the layer's attention tensors), found from the names of the state dict alone."""
    family = family_for(model.config.model_type)
    found = ((family.locate(name), tensor) for name, tensor in model.state_dict().items())
    return family, family.geometry(model.config.to_dict()), {at[1]: t for at, t in found if at and at[0] == layer}


def test_every_known_family_is_tested():
    coded = [name for name in known() if family_for(name).code]
    assert known() == sorted([*CONFIGS, *coded])
    assert coded == ["bloom_gqa", "gpt2_gqa", "opt_gqa", "t5_gqa"]  # test_holders has them


def test_join_is_the_exact_inverse_of_split(model):
    family, geometry, tensors = attention_tensors(model, 1)
    path = family.attention_path(1)
    assert tensors.keys() == model.get_submodule(path).state_dict().keys()
    joined = family.join(family.split(tensors, geometry), geometry)
    assert joined.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(joined[name], tensor), name
        assert joined[name].is_contiguous(), name


def test_projections_are_the_ones_that_the_model_computes_with(model):
    """Attention written out from the Projections equals the module's own, at a position that sees only itself."""
    family, geometry, tensors = attention_tensors(model, 0)
    p = family.split(tensors, geometry)
    assert p.q.shape == (geometry.num_heads, geometry.head_dim, geometry.dim)
    seen = {}
    attention = model.get_submodule(family.attention_path(0))

    def keep(module, args, kwargs, output):
        added = args[1] if family.model_type == "bloom" else 0  # its layer adds the residual itself
        seen.update(x=kwargs.get("hidden_states", args[0] if args else None), y=output[0] - added)

    hook = attention.register_forward_hook(keep, with_kwargs=True)
    logits(model)
    hook.remove()
    x = seen["x"][:, 0]
    v = torch.einsum("hdi,bi->bhd", p.v, x) + (0 if p.v_bias is None else p.v_bias)
    if clip := getattr(model.config, "clip_qkv", None):
        v = v.clamp(-clip, clip)
    v = v.repeat_interleave(geometry.num_heads // geometry.num_kv_heads, dim=1)
    y = torch.einsum("ohd,bhd->bo", p.o, v) + (0 if p.o_bias is None else p.o_bias)
    torch.testing.assert_close(y, seen["y"][:, 0])


def test_names_without_the_prefix_of_the_base_model_are_located_too():
    assert family_for("gpt2").locate("h.11.attn.c_attn.weight") == (11, "c_attn.weight")
    assert family_for("llama").locate("layers.3.self_attn.q_proj.weight") == (3, "q_proj.weight")
    assert family_for("llama").locate("model.layers.3.mlp.up_proj.weight") is None
    assert family_for("llama").locate("vision.layers.3.self_attn.q_proj.weight") is None


def test_an_unknown_family_is_refused_with_the_list_of_the_known():
    with pytest.raises(UnknownFamily, match=r"'mamba'.*gpt2.*llama"):
        family_for("mamba")
    with pytest.raises(UnknownFamily, match=r"gemma3_text"):
        family_for("gemma3")


def test_absent_config_keys_mean_the_defaults_of_the_stock_class():
    """The hub has old configs that say no more than what differs from the class."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 64, "hidden_size": 1024}
    for model_type in sorted(set(CONFIGS) - {"bloom", "falcon", "gpt2", "gpt_bigcode", "gptj", "t5"}):
        for config in (sizes, sizes | {"num_key_value_heads": 8, "head_dim": 24}):
            stock = type(tiny(model_type).config)(**config)
            geometry = family_for(model_type).geometry(config)
            own = model_type not in ("gpt_neox", "opt")
            expected = (getattr(stock, "num_key_value_heads", None) if own else None) or 64
            assert geometry.num_kv_heads == expected, model_type
            if getattr(stock, "head_dim", None) and own:
                assert geometry.head_dim == stock.head_dim, model_type


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_the_same_number_of_heads_changes_no_config(model_type):
    config = tiny(model_type).config.to_dict()
    assert family_for(model_type).with_kv_heads(config, 6) == config


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_heads_that_do_not_divide_are_refused_with_the_allowed_numbers(model_type):
    config = tiny(model_type).config.to_dict()
    for bad in (4, 12, 0, -1, 2.0):
        with pytest.raises(ConversionError, match=r"divide the model's 6 KV heads.*1, 2, 3, 6"):
            family_for(model_type).with_kv_heads(config, bad)


def test_what_no_class_holds_is_refused_with_what_could():
    with pytest.raises(Refusal, match="one KV head"):
        family_for("gpt_bigcode").with_kv_heads(tiny("gpt_bigcode").config.to_dict(), 3)


@pytest.mark.parametrize(("key", "value"), [("add_cross_attention", True), ("architectures", ["GPT2X"])])
@pytest.mark.parametrize("heads", [1, 2])
def test_gpt2_features_that_its_holders_lack_are_refused(key, value, heads):
    config = tiny("gpt2").config.to_dict() | {key: value}
    with pytest.raises(Refusal, match=key if key != "architectures" else "GPT2X"):
        family_for("gpt2").with_kv_heads(config, heads)


WINDOWED = ["mistral", "mixtral", "phi3", "starcoder2", "qwen3_moe", "qwen2", "qwen2_moe", "qwen3", "gemma2", "smollm3"]
TYPED = ("qwen2", "qwen2_moe", "qwen3", "gemma2", "smollm3")


@pytest.mark.parametrize("model_type", WINDOWED)
@pytest.mark.parametrize("mask", [SlidingWindow(3), Causal()])
def test_a_window_in_the_config_is_the_window_of_the_mask(model_type, mask):
    """Changing the config to the mask gives the logits of a model that is run under the mask, written out."""
    model = tiny(model_type)
    before = model.config.to_dict()
    config = family_for(model_type).with_mask(before, mask)
    assert before == model.config.to_dict()
    converted = type(model)(type(model.config).from_dict(config)).eval()
    converted.load_state_dict(model.state_dict())
    full = 16
    bias = torch.zeros(full, full).masked_fill(~mask.dense(full, full), torch.finfo(torch.float32).min)[None, None]
    ids = torch.arange(3, 3 + full)[None]
    # A dictionary of ready masks, one a layer type, is taken as it is; so is a plain tensor where there are no types.
    ready = dict.fromkeys(("full_attention", "sliding_attention"), bias)
    typed = model_type in TYPED
    with torch.no_grad():
        expected = model(ids, attention_mask=ready if typed else bias).logits
        torch.testing.assert_close(converted(ids).logits, expected)


@pytest.mark.parametrize(
    ("model_type", "mask"),
    [
        ("llama", SlidingWindow(3)),
        ("gpt2", SlidingWindow(3)),
        ("gemma3_text", Causal()),
        ("cohere2", SlidingWindow(3)),
        ("olmo3", Causal()),
        ("mistral", Full()),
        ("mistral", SlidingWindow(3, 2)),
    ],
)
def test_a_mask_that_the_class_has_not_is_refused(model_type, mask):
    with pytest.raises(Refusal, match="swap"):
        family_for(model_type).with_mask(tiny(model_type).config.to_dict(), mask)


def test_a_class_without_windows_is_causal_already():
    config = tiny("llama").config.to_dict()
    assert family_for("llama").with_mask(config, Causal()) == config


def test_tensors_that_are_no_plain_attention_are_named():
    family, geometry, tensors = attention_tensors(tiny("llama"), 0)
    with pytest.raises(ConversionError, match=r"k_proj\.weight, and it is missing"):
        family.split({name: t for name, t in tensors.items() if name != "k_proj.weight"}, geometry)
    with pytest.raises(ConversionError, match=r"q_proj\.lora_A"):
        family.split(tensors | {"q_proj.lora_A.weight": torch.zeros(1)}, geometry)
    with pytest.raises(ConversionError, match=r"v_proj\.weight has shape \[60, 47\].*\[60, 48\]"):
        family.split(tensors | {"v_proj.weight": torch.zeros(60, 47)}, geometry)
    with pytest.raises(ConversionError, match="'hidden_size'"):
        family.geometry({"num_attention_heads": 6, "num_hidden_layers": 2})
    with pytest.raises(ConversionError, match="qk_layernorm"):
        family_for("phi").geometry({"qk_layernorm": True})


def test_stablelm_with_a_norm_for_each_head_keeps_those_of_the_heads_that_are_left(tmp_path):
    model = duplicate(tiny("stablelm", qk_layernorm=True), 2)
    family, geometry, tensors = attention_tensors(model, 1)
    p = family.split(tensors, geometry)
    assert p.q_norm.shape == p.k_norm.shape == (6, 8) and not torch.equal(p.k_norm[0], p.k_norm[3])
    joined = family.join(p, geometry)
    assert joined.keys() == tensors.keys() and all(torch.equal(joined[name], tensors[name]) for name in tensors)
    model.save_pretrained(tmp_path / "many")
    few, report = AutoModelForCausalLM.from_pretrained(
        convert_checkpoint(tmp_path / "many", GQA(2), tmp_path / "few"), output_loading_info=True
    )
    assert not any(report.values()) and len(few.model.layers[0].self_attn.k_layernorm.norms) == 2
    torch.testing.assert_close(logits(few), logits(model), rtol=1e-5, atol=1e-5)
    del tensors["k_layernorm.norms.4.weight"]
    with pytest.raises(ConversionError, match=r"k_layernorm\.norms\.4"):
        family.split(tensors, geometry)
    with pytest.raises(Refusal, match="only to convert"):
        attnzoo.swap(model, GQA(2))
