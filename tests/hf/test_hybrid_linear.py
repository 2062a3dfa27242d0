"""attnzoo.convert of some layers to linear attention, whose feature maps learn the softmax heads' outputs."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import attnzoo
from attnzoo import GQA, Linear
from attnzoo.hf.blocks import Blocks, sharing
from attnzoo.hf.hybrid_request import read_request
from attnzoo.hf.hybrid_transfer import transfer_all
from attnzoo.hf.linear import SwappedLinearAttention
from attnzoo.hf.swap import rebuild

pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained")
HEDGEHOG = Linear(feature_map="hedgehog", window=4)


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


@pytest.fixture
def text():
    return torch.randint(2, 97, (4, 24), generator=torch.Generator().manual_seed(3))


def head_errors(model, changed, family, text):
    """Of each layer: the mean square error of each linear head's output against its softmax head's."""
    teacher = sharing(model)
    rebuild(teacher, [GQA()] * model.config.num_hidden_layers)
    before, after = Blocks(teacher, family), changed
    errors = []
    with torch.no_grad():
        hidden = before.enter(text)
        after.prepare(text)
        for number in range(len(before.blocks)):
            square = (before.heads(number, hidden) - after.heads(number, hidden)).square()
            errors.append(square.unflatten(-1, (model.config.num_attention_heads, -1)).mean((0, 1, 3)))
            hidden = before.run(number, hidden)
    return torch.stack(errors)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi", "gpt2", "stablelm"])
def test_transfer_brings_every_heads_output_nearer_to_its_softmax_heads(build, text, family):
    model = build(family)
    request = read_request(model, HEDGEHOG, None)
    swapped = sharing(model)
    rebuild(swapped, [HEDGEHOG] * 2)
    changed = Blocks(swapped, request.family)
    gradients = {}
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name] = torch.ones_like(parameter)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    untrained = head_errors(model, changed, request.family, text)
    transfer_all(model, changed, text, steps=60, seed=0)
    trained = head_errors(model, changed, request.family, text)
    assert (trained < untrained).float().mean() >= 0.75 and trained.sum() < 0.9 * untrained.sum()
    for name, parameter in model.named_parameters():  # q, k, v, o and all else are carried over, and not trained
        assert torch.equal(parameter, before[name]) and parameter.grad is gradients[name], name
        assert (parameter.grad == 1).all() and parameter.requires_grad


def test_trained_maps_cost_less_than_new_ones_and_layers_are_chosen_by_damage(build, text):
    told = []
    model = build("llama", num_hidden_layers=4)
    new = attnzoo.convert(model, HEDGEHOG, layers=2, calibration=text, steps=60, report=told.append)
    damage = told[0]
    kinds = [isinstance(block.self_attn, SwappedLinearAttention) for block in new.model.layers]
    assert [n for n in range(4) if kinds[n]] == damage.changed
    assert damage.changed == sorted(sorted(range(4), key=lambda n: damage.alone[n])[:2])
    attnzoo.convert(model, HEDGEHOG, layers=damage.changed, calibration=text, steps=0, report=told.append)
    assert damage.kl < told[1].kl
    assert damage.method == "linear" and damage.kv_bytes > 0


def test_the_result_is_saved_and_loads_again_exactly(build, text, tmp_path):
    model = build("llama")
    told = []
    new = attnzoo.convert(
        model, HEDGEHOG, layers=[1], calibration=text, steps=10, out=tmp_path / "out", report=told.append
    )
    assert not torch.equal(new.model.layers[1].self_attn.learned_map.q_weight[0], torch.eye(8))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, text), logits(new, text))
    assert torch.equal(
        loaded.generate(text, max_new_tokens=6, do_sample=False), new.generate(text, max_new_tokens=6, do_sample=False)
    )
    log = [one.log_softmax(-1).double()[:, :-1] for one in (logits(model, text), logits(new, text))]
    divergence = float((log[0].exp() * (log[0] - log[1])).sum(-1).mean())
    assert told[0].kl == pytest.approx(divergence, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_a_linear_layer_whose_window_is_the_whole_text_changes_no_logit(build, text, family):
    model = build(family, sliding_window=None) if family == "phi3" else build(family)
    new = attnzoo.convert(model, Linear(feature_map="hedgehog", window=24))
    assert (logits(new, text) - logits(model, text)).abs().max() < 1e-4


def test_half_precision_maps_are_trained_in_single_and_kept_in_half(build, text):
    model = build("llama", dtype=torch.bfloat16)
    new = attnzoo.convert(model, HEDGEHOG, layers=[0], calibration=text, steps=5)
    learned = new.model.layers[0].self_attn.learned_map.k_weight
    assert learned.dtype == torch.bfloat16 and not torch.equal(learned[0].float(), torch.eye(8))


def test_a_layer_without_anything_to_learn_is_still_chosen_by_damage(build, text):
    told = []
    new = attnzoo.convert(build("llama"), Linear(), layers=1, calibration=text, report=told.append)
    number = told[0].changed[0]
    assert isinstance(new.model.layers[number].self_attn, SwappedLinearAttention)
    assert told[0].alone[number] == min(told[0].alone)
