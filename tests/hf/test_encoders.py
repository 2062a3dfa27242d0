"""attnzoo.swap on encoders of BERT's family: attention in both directions, with padding."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    BertModel,
    ElectraConfig,
    ElectraModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

import attnzoo
from attnzoo import GQA, MLA, Linear
from attnzoo.masks import SlidingWindow
from tests.hf.conftest import padding

pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)),
    "electra": lambda: ElectraModel(ElectraConfig(**SIZES)),
}


def encoder(name):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


def states(model, tokens, mask=None):
    with torch.no_grad():
        return model(tokens, attention_mask=mask)[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_spec_that_changes_nothing_changes_no_state_and_no_name(tokens, name):
    model = encoder(name)
    mask = padding((12, 7, 4), 12, "right")
    want, names = states(model, tokens * mask, mask), set(model.state_dict())
    attnzoo.swap(model, GQA())
    got = states(model, tokens * mask, mask)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-12, rtol=1e-10)
    assert set(model.state_dict()) == names and "Attnzoo" not in type(model).__name__


@pytest.mark.parametrize(
    "spec",
    [GQA(2), GQA(mask=SlidingWindow(2, 1)), Linear(), Linear(1, "favor"), [Linear(normalize=False), GQA(1)]],
    ids=["gqa", "window", "linear", "favor", "mixed"],
)
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_padding_changes_no_state_and_attention_goes_both_ways(tokens, tmp_path, name, spec):
    model = attnzoo.swap(encoder(name), spec)
    mask = padding((12, 7, 4), 12, "right")
    got = states(model, tokens * mask, mask)
    for row, length in enumerate((12, 7, 4)):
        torch.testing.assert_close(
            got[row : row + 1, :length], states(model, tokens[row : row + 1, :length]), atol=1e-12, rtol=1e-10
        )
    other = tokens.clone()
    other[:, -1] = 96 - other[:, -1]
    changed = (states(model, other) - states(model, tokens)).abs().amax(-1) > 1e-9
    ahead = 2 if isinstance(spec, GQA) and spec.mask is not None else 12  # tokens that two layers carry back
    assert changed[:, max(0, 12 - 1 - ahead) :].all() and not changed[:, : max(0, 12 - 1 - ahead)].any()

    model.save_pretrained(tmp_path)
    auto = AutoModel if name == "bert" else AutoModelForMaskedLM
    loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    assert not any(report.values())
    torch.testing.assert_close(states(loaded, tokens * mask, mask), got)


def test_an_encoder_trains_with_linear_attention(tokens):
    model = attnzoo.swap(encoder("roberta"), Linear(feature_map="hedgehog")).train()
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("spec", [MLA(), Linear(window=3), Linear(decay="retnet"), GQA(3)])
def test_what_an_encoder_cannot_be_is_refused_and_changes_nothing(tokens, spec):
    model = encoder("bert")
    want = states(model, tokens)
    with pytest.raises(ValueError, match=r"encoder bert|not causal|must divide"):
        attnzoo.swap(model, spec)
    assert torch.equal(states(model, tokens), want)
    with pytest.raises(ValueError, match="is_decoder"):
        attnzoo.swap(BertModel(BertConfig(**SIZES, is_decoder=True)), GQA())
