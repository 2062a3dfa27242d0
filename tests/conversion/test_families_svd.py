"""Every family tells `svd` enough: heads that differ by what queries can take into themselves merge without a loss."""

from dataclasses import replace

import pytest
import torch

import attnzoo
from attnzoo.conversion import plan
from attnzoo.conversion.families import family_for
from attnzoo.conversion.svd import Inputs, svd
from attnzoo.specs import GQA
from tests.conversion.models import CONFIGS, duplicate, logits, tiny
from tests.conversion.test_rotary import CHANGES, turned

# Of a head's own norm no other basis comes through, so that heads behind one are alike here.
NORMED = [
    ("qwen3", {}),
    ("qwen3_moe", {}),
    ("gemma3_text", {}),
    ("olmo2", {}),
    ("olmo3", {}),
    ("cohere", {}),
    ("stablelm", {"qk_layernorm": True}),
]
PLAIN = [(name, CHANGES.get(name, {})) for name in sorted(CONFIGS) if name == "cohere" or (name, {}) not in NORMED]


def spread(model):
    """The same function with each KV head, and its queries, in another basis that RoPE lets through."""
    family, config = family_for(model.config.model_type), model.config.to_dict()
    geometry = family.geometry(config)
    per = geometry.num_heads // geometry.num_kv_heads
    for number in range(family.attentions(geometry)):
        attention = model.get_submodule(family.attention_path(number))
        state, rotary = attention.state_dict(), family.rotary(config, number)
        p = family.split(state, geometry)

        def heads_of(tensor, size, number=number, rotary=rotary):
            seeds = (torch.Generator().manual_seed(100 * number + head) for head in range(geometry.num_kv_heads))
            return torch.cat([turned(part, rotary, seed) for part, seed in zip(tensor.split(size), seeds, strict=True)])

        changes = {"k": heads_of(p.k, 1), "q": heads_of(p.q, per)}
        if p.k_bias is not None:
            changes |= {"k_bias": heads_of(p.k_bias, 1), "q_bias": heads_of(p.q_bias, per)}
        attention.load_state_dict(state | family.join(replace(p, **changes), geometry))
    return model


def by_svd(family, config, geometry):
    """In place of `merge_heads`: the closed form, for inputs of which nothing is known."""
    every = torch.eye(geometry.dim + 1, dtype=torch.float64)

    def merge(p, heads, method, seed, *, layer):
        if p.k.is_meta:
            return original(p, heads, method, seed, layer=layer)
        seen = p
        if p.k_norm is not None:
            seen = replace(p, q_norm=p.q_norm + family.norm_offset, k_norm=p.k_norm + family.norm_offset)
        rotary = family.rotary(config, layer)
        new = svd(seen, heads, rotary, Inputs(every, every), centred=family.centred_norm)
        return replace(new, q_norm=p.q_norm, k_norm=p.k_norm) if p.k_norm is not None and p.k_norm.ndim == 1 else new

    original = plan.merge_heads
    return merge


@pytest.mark.parametrize(("name", "changes"), PLAIN + NORMED)
def test_heads_in_different_bases_merge_exactly(name, changes, monkeypatch):
    heads = 1 if name == "gpt_bigcode" else 2
    model = duplicate(tiny(name, **changes), heads)
    if (name, changes) not in NORMED:
        spread(model)
        assert (logits(attnzoo.convert(model, GQA(heads))) - logits(model)).abs().max() > 0.1  # not for the mean
    family, config = family_for(name), model.config.to_dict()
    monkeypatch.setattr(plan, "merge_heads", by_svd(family, config, family.geometry(config)))
    new = attnzoo.convert(model, GQA(heads))
    torch.testing.assert_close(logits(new), logits(model), rtol=1e-4, atol=5e-5)
