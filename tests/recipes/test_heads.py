"""How the head of a model is found, for families that do something to their logits and for those that do not."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from recipes.heads import check_head, head_of

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}


def tiny(family, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **more))


@pytest.mark.parametrize(
    ("family", "more", "softcap", "scale"),
    [
        ("llama", {}, None, 1.0),
        ("qwen2", {"tie_word_embeddings": True}, None, 1.0),
        ("gpt_neox", {}, None, 1.0),
        ("phi", {}, None, 1.0),  # its head has a bias
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2}, None, 1.0),
        ("gemma2", {"final_logit_softcapping": 7.0}, 7.0, 1.0),
        ("gemma2", {"final_logit_softcapping": None}, None, 1.0),
        ("cohere", {"logit_scale": 0.25}, None, 0.25),
        ("granite", {"logits_scaling": 8.0}, None, 0.125),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_s_logits_are_the_model_s(family, more, softcap, scale, dtype):
    model = tiny(family, **more).to(dtype)
    head = head_of(model)
    assert (head.softcap, head.logit_scale) == (softcap, scale) and head.weight is model.get_output_embeddings().weight
    ids = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(1))
    model.eval()
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = F.linear(hidden, head.weight, head.bias)
        logits = logits * scale if softcap is None else softcap * torch.tanh(logits * scale / softcap)
        torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=2e-2, atol=1e-2)


def test_asking_leaves_the_model_as_it_was():
    model = tiny("llama").train()
    check_head(model)
    assert model.training and not model.lm_head._forward_hooks and not model.model._forward_hooks


def test_a_model_that_is_compiled_already_is_asked_without_compiling():
    model = tiny("llama")
    seen = []
    model.compile(backend=lambda graph, inputs: seen.append(graph) or graph.forward)
    assert head_of(model).logit_scale == 1.0 and not seen


@pytest.mark.parametrize("spoil", ["logits", "hidden", "linear"])
def test_a_model_that_does_anything_else_to_its_logits_is_refused(spoil):
    model = tiny("llama")
    if spoil == "logits":
        model.register_forward_hook(lambda module, args, out: setattr(out, "logits", out.logits.square()))
    elif spoil == "hidden":
        model.lm_head.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    else:
        model.lm_head.register_forward_hook(lambda module, args, out: out + 0.5)
    with pytest.raises(ValueError, match="LlamaForCausalLM does not make its logits"):
        head_of(model)
