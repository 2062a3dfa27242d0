"""Projections that run as one matmul: what they give, and when they are left alone."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, AutoModelForCausalLM

from recipes.merging import merge_projections

SIZES = {
    **{"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0},
}
IDS = torch.arange(2, 14)[None]


def tiny(family):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES))


def result(model):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "mistral", "olmo2"])
def test_a_merged_model_computes_what_it_did_and_keeps_its_parameters(family):
    model = tiny(family)
    names = [name for name, _ in model.named_parameters()]
    loss, gradients = result(model)
    assert merge_projections(model) == 4
    merged_loss, merged = result(model)
    assert [name for name, _ in model.named_parameters()] == names
    torch.testing.assert_close(merged_loss, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(merged[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_layers_still_share_what_is_compiled_and_nothing_is_kept_between_calls():
    model, counter = tiny("llama"), CompileCounter()
    loss, _ = result(model)
    merge_projections(model)
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(result(model)[0], loss)
    assert counter.frame_count == 1
    neighbours = model.model.layers[0].mlp.gate_proj.neighbours
    assert neighbours.input is None and not neighbours.outputs


def test_a_projection_that_gets_another_tensor_computes_its_own():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, width) for width in (8, 4, 4))

        def forward(self, x, other):
            return self.q_proj(x), self.k_proj(other), self.v_proj(other)

    module, (x, other) = Cross(), torch.randn(2, 3, 8)
    expected = module(x, other)
    assert merge_projections(module) == 1
    for got, want in zip(module(x, other), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_projections_that_do_not_all_train_or_are_not_plain_are_left_alone():
    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.requires_grad_(False)
        layer.mlp.up_proj = nn.Sequential(layer.mlp.up_proj)
    assert merge_projections(model) == 0
