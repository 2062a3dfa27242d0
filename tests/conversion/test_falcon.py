"""Falcon's three layouts, with RoPE and with ALiBi: which of them hold fewer KV heads."""

import pytest
import torch

from attnzoo.conversion import Refusal, convert_checkpoint
from attnzoo.conversion.families import family_for
from attnzoo.conversion.rotary import Rotary
from attnzoo.specs import GQA
from tests.conversion.models import duplicate, generated, logits, tiny, tokens
from tests.conversion.test_checkpoint import load

OLD = {"new_decoder_architecture": False, "num_kv_heads": None}
HEADS = OLD | {"multi_query": False}
RW = HEADS | {"alibi": True, "parallel_attn": False}  # falcon-rw, bloom's order of things
# (config, KV heads before, after)
HELD = [
    ({}, 6, 2),
    ({"num_kv_heads": 3}, 3, 1),
    ({"alibi": True, "bias": False}, 6, 3),
    (HEADS, 6, 3),
    (HEADS, 6, 1),
    (HEADS | {"alibi": True, "tie_word_embeddings": False}, 6, 2),
    (RW, 6, 1),
    (OLD, 1, 1),
]


@pytest.mark.parametrize(("changes", "before", "after"), HELD)
def test_each_layout_gives_what_duplicated_heads_compute(changes, before, after, tmp_path):
    model = tiny("falcon", **changes)
    family = family_for("falcon")
    assert family.geometry(model.config.to_dict()).num_kv_heads == before
    duplicate(model, after).save_pretrained(tmp_path / "many")
    few = load(convert_checkpoint(tmp_path / "many", GQA(after), tmp_path / "few"))
    assert family.geometry(few.config.to_dict()).num_kv_heads == after
    torch.testing.assert_close(logits(few), logits(model), rtol=1e-5, atol=1e-5)
    assert torch.equal(generated(few), generated(model))
    if few.config.new_decoder_architecture:
        return  # the stock class caches repeated heads
    assert few(tokens()).past_key_values.layers[0].keys.shape[1] == after


def test_attention_before_the_mlp_holds_one_head_or_all():
    config = tiny("falcon", **RW).config.to_dict()
    with pytest.raises(Refusal, match="one KV head or as many"):
        family_for("falcon").with_kv_heads(config, 3)


def test_rope_turns_nothing_under_alibi():
    family = family_for("falcon")
    assert family.rotary(tiny("falcon").config.to_dict(), 0) == Rotary(8)
    assert family.rotary(tiny("falcon", alibi=True).config.to_dict(), 0) == Rotary()
