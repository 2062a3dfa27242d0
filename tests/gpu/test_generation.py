"""Captured steps on a GPU: the tokens of plain steps, for every mechanism and cache, greedy and sampled."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attnzoo
import attnzoo.hf
from attnzoo import GQA, MLA, Linear
from attnzoo.masks import Causal, GlobalTokens, SlidingWindow
from tests.hf.test_generation import Heard

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained of this model")
CASES = {
    "mha": (GQA(), "contiguous"),
    "gqa paged": (GQA(num_kv_heads=2), "paged"),
    "gqa int8": (GQA(num_kv_heads=2), "int8"),
    "gqa paged int8": (GQA(num_kv_heads=2), "paged_int8"),
    "mqa": (GQA(num_kv_heads=1), "contiguous"),
    "window": (GQA(mask=SlidingWindow(24)), "rolling"),
    "window and first tokens": (GQA(mask=SlidingWindow(20) | (GlobalTokens(4) & Causal())), "rolling"),
    "mla": (MLA(kv_lora_rank=64), "contiguous"),
    "mla paged": (MLA(kv_lora_rank=64), "paged"),
    "linear": (Linear(), "contiguous"),
    "decay": (Linear(feature_map="identity", normalize=False, decay="retnet"), "contiguous"),
    "hybrid": (Linear(num_kv_heads=2, window=24), "contiguous"),
    "learned hybrid": ([Linear(feature_map="hedgehog", window=64), GQA(), Linear(feature_map="hedgehog")], "rolling"),
}


def model_of(spec) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=211,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return attnzoo.swap(model, spec).cuda()


@pytest.fixture
def prompt() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, 211, (3, 80), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(80) >= 80 - torch.tensor([[80], [33], [51]])).long()
    return (ids * mask).cuda(), mask.cuda()


@pytest.mark.parametrize("name", CASES)
def test_a_graph_a_token_gives_the_tokens_of_plain_steps(prompt, name):
    spec, kind = CASES[name]
    model = model_of(spec)
    # Near ties may fall either way where sums run in another order; the model's own cache is the measure in fp32.
    want = model.generate(prompt[0], attention_mask=prompt[1], max_new_tokens=40, do_sample=False)
    got = attnzoo.hf.generate(model, *prompt, cache=kind, graph=True, max_new_tokens=40)
    plain = attnzoo.hf.generate(model, *prompt, cache=kind, graph=False, max_new_tokens=40)
    if "int8" in kind:  # codes are no exact copies; both ways read the same ones
        assert (got == plain).float().mean() > 0.95
    else:
        assert torch.equal(plain, want)
        assert torch.equal(got, want)


def test_a_streamer_hears_the_tokens_of_captured_steps(prompt):
    heard = Heard()
    out = attnzoo.hf.generate(model_of(GQA(num_kv_heads=2)), *prompt, graph=True, max_new_tokens=20, streamer=heard)
    assert heard.ended and torch.equal(torch.stack(heard.parts[1:], dim=1), out[:, 80:].cpu())


@pytest.mark.parametrize("own", [False, True], ids=["given a cache", "by itself"])
@pytest.mark.parametrize("name", ["gqa paged", "window", "mla", "linear", "learned hybrid"])
def test_transformers_generate_replays_the_graph_through_the_bridge(prompt, name, own):
    spec, kind = CASES[name]
    model = model_of(spec)
    want = model.generate(prompt[0], attention_mask=prompt[1], max_new_tokens=40, do_sample=False)
    cache = None if own else attnzoo.hf.cache_for(model, 3, 120, kind)
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    with pytest.MonkeyPatch.context() as patch, attnzoo.hf.graphed(model):
        patch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph)))
        got = model.generate(
            prompt[0], attention_mask=prompt[1], max_new_tokens=40, do_sample=False, past_key_values=cache
        )
    assert torch.equal(got, want)
    assert len(replays) == 38  # all but the prompt and the first step
    assert cache is None or cache.get_seq_length() == 119


def test_sampling_in_a_graph_follows_the_seed_and_the_distribution():
    model = model_of(GQA(num_kv_heads=2))
    ids = torch.full((512, 4), 7, device="cuda")
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(attnzoo.hf.generate(model, ids, max_new_tokens=6, do_sample=True, top_k=3, graph=True))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0][:, -1].unique().numel() > 3  # replays draw anew, row by row
    with torch.no_grad():
        logits = model(drawn[0][:, :-1]).logits[:, -1]
    assert (drawn[0][:, -1, None] == logits.topk(3).indices).any(dim=1).all()


def test_compiled_pieces_change_no_token(prompt):
    model = model_of(GQA(num_kv_heads=2))
    want = attnzoo.hf.generate(model, *prompt, max_new_tokens=12, graph=True)
    assert torch.equal(attnzoo.hf.generate(model, *prompt, max_new_tokens=12, graph=True, fuse=True), want)


def test_a_mask_with_first_tokens_is_made_inside_a_graph():
    mask = SlidingWindow(2) | (GlobalTokens(2) & Causal())
    i, j = torch.arange(8, device="cuda")[:, None], torch.arange(8, device="cuda")
    want = mask.visible(i, j)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = mask.visible(i, j)
    graph.replay()
    assert torch.equal(got, want) and not want.all()
