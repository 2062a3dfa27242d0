"""Generation with attnzoo's caches: stock transformers' tokens, whatever the cache, the mechanism and the padding."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import attnzoo
from attnzoo import GQA, MLA, Linear
from attnzoo.caches import Int8Cache, LatentCache, PagedCache, PagedInt8Cache, RollingCache
from attnzoo.hf.generation import bridge
from attnzoo.hf.generation.bridge import graphed
from attnzoo.hf.generation.graph import Step, refusal
from attnzoo.masks import Causal, GlobalTokens, SlidingWindow
from tests.hf.conftest import FAMILIES, padding

NEW = 10
KINDS = ("contiguous", "paged", "int8", "paged_int8", "rolling")
SPECS = {
    "gqa": GQA(num_kv_heads=2),
    "mqa": GQA(num_kv_heads=1),
    "window": GQA(mask=SlidingWindow(5)),
    "mla": MLA(kv_lora_rank=16),
    "mla in a window": MLA(kv_lora_rank=16, mask=SlidingWindow(5)),
    "linear": Linear(),
    "decay": Linear(feature_map="identity", normalize=False, decay="retnet"),
    "hybrid": Linear(window=4),
    "learned hybrid": [Linear(feature_map="hedgehog", window=6), GQA(num_kv_heads=2)],
    "mixed": [GQA(num_kv_heads=2), Linear()],
    "window and first tokens": GQA(mask=SlidingWindow(4) | (GlobalTokens(2) & Causal())),
}


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Each mechanism with two kinds of cache, the plain cache's full attention with all of them."""
    chosen = {"gqa": KINDS, "linear": KINDS[:1], "decay": KINDS[:1], "hybrid": KINDS[:1]}
    return [
        (name, kind)
        for place, name in enumerate(names)
        for kind in chosen.get(name, (KINDS[place % 4], "rolling" if "window" in name else KINDS[(place + 2) % 4]))
    ]


pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained of this model")


@pytest.fixture(params=["whole", "left-padded"])
def prompt(request, tokens) -> tuple[Tensor, Tensor]:
    """Tokens and their mask, both `[3, 12]`."""
    mask = torch.ones_like(tokens) if request.param == "whole" else padding((12, 7, 9), 12, "left")
    return tokens.masked_fill(mask == 0, 0), mask


def greedy(model, ids: Tensor, mask: Tensor, **more) -> Tensor:
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **more)


def cache_of(model, kind: str = "contiguous", rows: int = 3) -> attnzoo.hf.generation.cache.HeldCache:
    return attnzoo.hf.cache_for(model, rows, 12 + NEW, kind)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2_moe"])
def test_every_family_generates_the_tokens_of_its_stock_attention(build, prompt, family):
    model = build(family)
    want = greedy(model, *prompt)
    model.set_attn_implementation("attnzoo")
    assert torch.equal(greedy(model, *prompt, past_key_values=cache_of(model, "rolling")), want)


@pytest.mark.parametrize(("name", "kind"), pairs(SPECS))
def test_every_mechanism_generates_what_it_does_with_transformers_cache(build, prompt, name, kind):
    model = attnzoo.swap(build("llama"), SPECS[name])
    want = greedy(model, *prompt)
    assert torch.equal(greedy(model, *prompt, past_key_values=cache_of(model, kind)), want)
    assert torch.equal(attnzoo.hf.generate(model, *prompt, cache=kind, max_new_tokens=NEW), want)


@pytest.mark.parametrize(("name", "kind"), pairs(SPECS))
def test_steps_that_count_on_the_device_change_no_token_and_can_be_left(build, prompt, name, kind):
    model = attnzoo.swap(build("llama"), SPECS[name])
    want = greedy(model, *prompt)[:, 12:]
    got, tokens, cache = stepped(model, prompt, kind, steps=6)
    with torch.no_grad():
        while len(got) < NEW:
            positions = torch.tensor(cache.row_lengths())[:, None]
            tokens = (
                model(input_ids=tokens[:, None], position_ids=positions, past_key_values=cache).logits[:, -1].argmax(-1)
            )
            got.append(tokens)
    assert torch.equal(torch.stack(got, dim=1), want)
    assert cache.get_seq_length() == 12 + NEW - 1


def stepped(model, prompt, kind: str, steps: int):
    """A prompt and some steps; the tokens, the last of them, and the cache."""
    ids, mask = prompt
    cache = cache_of(model, kind)
    with torch.no_grad():
        tokens = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                       past_key_values=cache).logits[:, -1].argmax(-1)  # fmt: skip
        step = Step(model, cache, choose=lambda logits: logits.argmax(-1))
        step.tokens.copy_(tokens[:, None])
        got = [tokens]
        for _ in range(steps):
            step()
            got.append(step.tokens[:, 0].clone())
        step.leave()
    return got, got[-1], cache


@pytest.mark.parametrize("kind", ["int8", "paged_int8"])
def test_an_int8_cache_is_read_as_the_bytes_that_it_holds(build, tokens, kind, monkeypatch):
    # Exact tokens would hide whether codes and scales are found: none are held, and the result is near, not equal.
    for cls in (Int8Cache, PagedInt8Cache):
        monkeypatch.setitem(cls.__init__.__kwdefaults__, "residual", 0)
    model = attnzoo.swap(build("llama"), GQA(num_kv_heads=2))
    ones = torch.ones_like(tokens)
    _, _, plain = stepped(model, (tokens, ones), "contiguous", steps=1)
    _, _, cache = stepped(model, (tokens, ones), kind, steps=1)
    for held, whole in zip(cache.memories, plain.memories, strict=True):
        for got, want in zip(held.view(), whole.view(), strict=True):
            assert 0 < (got[:, :, :12] - want[:, :, :12]).abs().max() < 0.05 * want.abs().max()


def test_memory_is_what_the_mechanism_and_the_kind_promise(build, prompt):
    kinds = {"contiguous": LatentCache, "paged": PagedCache, "int8": Int8Cache, "rolling": RollingCache}
    latent = attnzoo.swap(build("llama"), MLA(kv_lora_rank=16, mask=SlidingWindow(5)))
    for kind, cls in kinds.items():
        cache = cache_of(latent, kind)
        greedy(latent, *prompt, past_key_values=cache)
        assert all(type(memory) is cls and memory.num_kv_heads == 1 for memory in cache.memories)
    whole, fewer = (attnzoo.swap(build("llama"), GQA(num_kv_heads=heads)) for heads in (4, 1))
    sizes = []
    for model in (whole, fewer):
        cache = cache_of(model)
        greedy(model, *prompt, past_key_values=cache)
        sizes.append(cache.nbytes)
    assert sizes[0] == 4 * sizes[1] == 2 * 2 * 3 * 22 * 32 * 4  # keys and values, layers, rows, tokens, dim, bytes


def test_a_rolling_cache_goes_round_many_times(build, tokens):
    model = build("mistral")
    want = model.generate(tokens, max_new_tokens=40, do_sample=False)
    model.set_attn_implementation("attnzoo")
    cache = attnzoo.hf.cache_for(model, 3, 52, "rolling")
    assert torch.equal(model.generate(tokens, max_new_tokens=40, do_sample=False, past_key_values=cache), want)
    assert all(memory.stored().size == 5 for memory in cache.memories)


def test_sampling_with_a_seed_draws_the_tokens_of_stock_sampling(build, prompt):
    model = attnzoo.swap(build("llama"), GQA(num_kv_heads=2))
    for options in ({}, {"temperature": 0.7, "top_k": 11, "top_p": 0.8}, {"min_p": 0.05, "top_k": 0}):
        torch.manual_seed(3)
        want = model.generate(prompt[0], attention_mask=prompt[1], max_new_tokens=NEW, do_sample=True, **options)
        torch.manual_seed(3)
        got = attnzoo.hf.generate(model, *prompt, max_new_tokens=NEW, do_sample=True, **options)
        assert torch.equal(got, want)


def test_rows_that_end_are_padded_and_generation_stops_with_the_last(build, prompt):
    model = attnzoo.swap(build("llama"), GQA(num_kv_heads=2))
    free = greedy(model, *prompt)[:, 12:]
    ends = sorted({int(free[0, 2]), int(free[1, 4]), int(free[2, 1])})
    want = greedy(model, *prompt, eos_token_id=ends)
    got = attnzoo.hf.generate(model, *prompt, max_new_tokens=NEW, eos_token_id=ends)
    assert torch.equal(got, want)
    assert got.shape[1] < 12 + NEW


def test_right_padding_gives_what_left_padding_gives(build, tokens):
    model = attnzoo.swap(build("llama"), SPECS["mixed"])
    left, right = (padding((12, 7, 9), 12, side) for side in ("left", "right"))
    moved = torch.zeros_like(tokens)
    moved[left.bool()] = tokens[right.bool()]
    want = attnzoo.hf.generate(model, moved, left, max_new_tokens=NEW)[:, 12:]
    assert torch.equal(attnzoo.hf.generate(model, tokens * right, right, max_new_tokens=NEW)[:, 12:], want)


@pytest.mark.parametrize(("name", "kind"), [("gqa", "paged"), ("mla", "int8"), ("mixed", "contiguous")])
def test_beams_and_several_samples_move_the_cache_with_them(build, prompt, name, kind):
    model = attnzoo.swap(build("llama"), SPECS[name])
    want = greedy(model, *prompt, num_beams=3)
    assert torch.equal(greedy(model, *prompt, num_beams=3, past_key_values=cache_of(model, kind, rows=9)), want)


def test_assisted_decoding_takes_back_what_was_guessed_wrong(build, tokens):
    model, helper = build("llama", implementation="attnzoo"), build("llama", num_hidden_layers=1)
    ids, mask = tokens[:1], torch.ones_like(tokens[:1])
    want = greedy(model, ids, mask)
    cache = attnzoo.hf.cache_for(model, 1, 40)
    assert torch.equal(greedy(model, ids, mask, assistant_model=helper, past_key_values=cache), want)


def test_a_conversation_goes_on_in_the_same_cache(build, tokens):
    model = attnzoo.swap(build("llama"), SPECS["mixed"])
    cache = attnzoo.hf.cache_for(model, 3, 40)
    ones = torch.ones(3, 12, dtype=torch.int64)
    first = greedy(model, tokens, ones, past_key_values=cache)
    more = torch.cat([first, tokens[:, :4]], dim=1)
    mask = torch.ones_like(more)
    assert torch.equal(greedy(model, more, mask, past_key_values=cache), greedy(model, more, mask))


@pytest.fixture
def made(monkeypatch) -> list[attnzoo.hf.generation.cache.HeldCache]:
    """The caches that `graphed` makes for `model.generate`."""
    caches = []
    monkeypatch.setattr(bridge, "cache_for", lambda *args: caches.append(attnzoo.hf.cache_for(*args)) or caches[-1])
    return caches


@pytest.mark.parametrize("name", list(SPECS))
def test_in_graphed_generate_takes_the_best_cache_by_itself(build, prompt, made, name):
    model = attnzoo.swap(build("llama"), SPECS[name])
    want, before = greedy(model, *prompt), model.forward
    with graphed(model):
        assert torch.equal(greedy(model, *prompt), want)
        assert torch.equal(greedy(model, *prompt, use_cache=False), want)
        assert torch.equal(greedy(model, *prompt, past_key_values=cache_of(model)), want)
    assert model.forward == before
    assert not {"forward", "_prepare_cache_for_generation"} & set(vars(model))
    (cache,) = made
    assert (cache.rows, cache.max_length) == (3, 12 + NEW - 1)
    kinds = {type(memory) for memory in cache.memories}
    assert (RollingCache in kinds) == (name in ("window", "mla in a window", "window and first tokens"))


def test_in_graphed_beams_and_guesses_get_a_cache_that_can_do_them(build, tokens, made):
    model = attnzoo.swap(build("llama"), SPECS["window"])
    ones = torch.ones_like(tokens)
    helper = build("llama", num_hidden_layers=1)
    want = [greedy(model, tokens, ones, num_beams=2), greedy(model, tokens[:1], ones[:1])]
    with graphed(model):
        got = [greedy(model, tokens, ones, num_beams=2), greedy(model, tokens[:1], ones[:1], assistant_model=helper)]
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    assert [cache.rows for cache in made] == [6, 1]
    assert not any(isinstance(memory, RollingCache) for memory in made[1].memories)


def test_in_graphed_a_model_without_our_attention_keeps_its_cache(build, prompt, made):
    model = build("llama", implementation="sdpa")
    want = greedy(model, *prompt)
    with graphed(model):
        assert torch.equal(greedy(model, *prompt), want)
    assert made == []


def test_compiled_pieces_leave_a_step_as_it_was(build, prompt):
    from attnzoo.hf.generation.fused import fused

    model = attnzoo.swap(build("llama"), GQA(num_kv_heads=2))
    ids, mask = prompt
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask).logits
        with fused(model):
            norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
            assert norms
            assert all("forward" in vars(norm) for norm in norms)
            got = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got, want)
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_cannot_be_captured_says_why(build, tokens):
    hybrid = attnzoo.swap(build("llama"), SPECS["hybrid"])
    cache = cache_of(hybrid)
    assert "not there yet" in refusal(hybrid, cache)
    cache.activate_past_recording()
    greedy(hybrid, tokens, torch.ones_like(tokens), past_key_values=cache)
    assert "recorded for assisted decoding" in refusal(hybrid, cache)
    with pytest.raises(ValueError, match="steps cannot be captured: a state"):
        Step(hybrid, cache)()
    with pytest.raises(ValueError, match="graph is True"):
        attnzoo.hf.generate(hybrid, tokens, graph=True, max_new_tokens=2)
    assert "empty" in refusal(build("llama"), cache_of(build("llama", implementation="attnzoo")))


def test_wrong_caches_and_options_are_refused_with_a_reason(build, tokens):
    model, ones = build("llama", implementation="attnzoo"), torch.ones_like(tokens)
    with pytest.raises(ValueError, match="attn_implementation 'sdpa'"):
        attnzoo.hf.cache_for(build("llama", implementation="sdpa"), 3, 22)
    with pytest.raises(ValueError, match="kind is 'rotating'"):
        attnzoo.hf.cache_for(model, 3, 22, "rotating")
    with pytest.raises(ValueError, match="qwen2_moe do not tell"):
        attnzoo.hf.cache_for(build("qwen2_moe", implementation="attnzoo", use_sliding_window=True, sliding_window=5,
                                   layer_types=["sliding_attention"] * 2), 3, 22)  # fmt: skip
    with pytest.raises(ValueError, match="softcap"):
        attnzoo.hf.cache_for(attnzoo.swap(build("gemma2"), MLA(kv_lora_rank=16)), 3, 22)
    with pytest.raises(ValueError, match="made for batch_size 2; a batch of 3 came"):
        greedy(model, tokens, ones, past_key_values=cache_of(model, rows=2))
    with pytest.raises(ValueError, match="cache full: it holds 20 tokens of max_length 20"):
        greedy(model, tokens, ones, past_key_values=attnzoo.hf.cache_for(model, 3, 20))
    with pytest.raises(ValueError, match="num_beams is 2"):
        attnzoo.hf.generate(model, tokens, num_beams=2)
    with pytest.raises(ValueError, match=r"does not have: \['tempreature'\]"):
        attnzoo.hf.generate(model, tokens, tempreature=2)


def test_a_mask_that_hides_more_than_padding_is_refused(build, tokens):
    model = build("llama", implementation="attnzoo")
    visible = torch.ones(12, 12, dtype=torch.bool).tril()
    visible[8, 3] = False
    with pytest.raises(ValueError, match="hides or shows other keys"):
        model(input_ids=tokens, attention_mask=visible.expand(3, 1, 12, 12), past_key_values=cache_of(model))


def test_patterns_that_count_positions_count_real_tokens(build, prompt):
    model = attnzoo.swap(build("llama"), GQA(mask=Causal() & (SlidingWindow(4) | GlobalTokens(2))))
    want = greedy(model, *prompt)
    assert torch.equal(greedy(model, *prompt, past_key_values=cache_of(model)), want)
    got, *_ = stepped(model, prompt, "contiguous", steps=NEW - 1)
    assert torch.equal(torch.stack(got, dim=1), want[:, 12:])


class Heard(BaseStreamer):
    """What a streamer is told."""

    def __init__(self) -> None:
        self.parts, self.ended = list[Tensor](), False

    def put(self, value: Tensor) -> None:
        assert not self.ended
        self.parts.append(value)

    def end(self) -> None:
        self.ended = True


def test_a_streamer_hears_the_prompt_and_every_token_as_it_is_chosen(build, prompt):
    ids, mask = prompt
    model, heard = attnzoo.swap(build("llama"), GQA(num_kv_heads=2)), Heard()
    out = attnzoo.hf.generate(model, ids, mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, streamer=heard)
    assert heard.ended and torch.equal(heard.parts[0], ids)
    assert torch.equal(torch.stack(heard.parts[1:], dim=1), out[:, ids.shape[1] :])
    end, heard = int(out[1, -3]), Heard()
    out = attnzoo.hf.generate(model, ids[1:2], mask[1:2], max_new_tokens=NEW, eos_token_id=end, streamer=heard)
    assert heard.ended and heard.parts[-1].item() == end and len(heard.parts) - 1 == out.shape[1] - ids.shape[1]
