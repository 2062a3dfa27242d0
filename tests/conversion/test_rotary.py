"""What families say of RoPE, shown on the models: changes of basis that commute with it leave every logit alone."""

import pytest
import torch

from attnzoo.conversion.families import family_for
from attnzoo.conversion.rotary import Rotary
from tests.conversion.models import CONFIGS, logits, tiny

# What no basis but its own goes through is off: norms that subtract a mean, clipping. Other norms weigh all alike.
CHANGES = {"cohere": {"use_qk_norm": False}, "olmo": {"clip_qkv": None}}
ROTATED = sorted(name for name in CONFIGS if family_for(name).rope)
SIZES = {"phi": 4, "stablelm": 2, "nemotron": 6, "gpt_neox": 2, "gptj": 6}


def model_of(name):
    model = tiny(name, **CHANGES.get(name, {}))
    for path, parameter in model.named_parameters():
        if path.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.data.fill_(0.0 if name == "gemma3_text" else 1.0)  # Gemma's add 1
    return model


def turned(heads, rotary: Rotary, generator: torch.Generator):
    """Rows of `heads [H, D, ...]` turned by an angle for each plane; the rest by any rotation."""
    first, second = rotary.planes()
    out = heads.clone()
    angle = torch.rand(len(first), generator=generator) * 6.28
    cos, sin = (t.view(-1, *[1] * (heads.ndim - 2)) for t in (angle.cos(), angle.sin()))
    out[:, first] = heads[:, first] * cos - heads[:, second] * sin
    out[:, second] = heads[:, second] * cos + heads[:, first] * sin
    free = rotary.free(heads.shape[1])
    basis = torch.linalg.qr(torch.randn(len(free), len(free), generator=generator)).Q
    out[:, free] = torch.einsum("ij,hj...->hi...", basis, heads[:, free])
    return out


def turn(model, rotary_of) -> torch.Tensor:
    """Its logits with q and k of every layer in other bases."""
    family = family_for(model.config.model_type)
    config = model.config.to_dict()
    geometry = family.geometry(config)
    for number in range(family.attentions(geometry)):
        attention = model.get_submodule(family.attention_path(number))
        state = attention.state_dict()
        p = family.split(state, geometry)
        for parts in (("q", "k"), ("q_bias", "k_bias")):
            if getattr(p, parts[0]) is not None:
                for part in parts:
                    generator = torch.Generator().manual_seed(number)  # the same for all heads of q and k
                    new = turned(getattr(p, part), rotary_of(family, config, number), generator)
                    object.__setattr__(p, part, new)
        attention.load_state_dict(state | family.join(p, geometry))
    return logits(model)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_turning_the_planes_that_the_family_names_changes_no_logit(name):
    model = model_of(name)
    want = logits(model)
    got = turn(model, lambda family, config, layer: family.rotary(config, layer))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("name", ROTATED)
def test_turning_other_planes_does(name):
    """So that the test above cannot pass for want of positions."""
    model = model_of(name)
    want = logits(model)
    other = {"half": "interleaved", "interleaved": "half"}

    def wrong(family, config, layer):
        rotary = family.rotary(config, layer)
        return Rotary(rotary.size, other[rotary.layout]) if rotary.size > 2 else Rotary()

    assert (turn(model, wrong) - want).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_partial_rotary_is_read_from_the_config_or_the_class(name, size):
    config = tiny(name).config.to_dict()
    family = family_for(name)
    assert family.rotary(config, 0).size == size
    if name != "gptj":
        del config["rope_parameters"]
        assert family.rotary(config, 0).size == size


def test_layers_without_rope_are_known_from_the_list_or_the_interval():
    for name, key, interval in (
        ("smollm3", "no_rope_layers", "no_rope_layer_interval"),
        ("cohere2", "layer_types", "sliding_window_pattern"),
    ):
        family, config = family_for(name), tiny(name).config.to_dict()
        assert [bool(family.rotary(config, layer).size) for layer in range(2)] == [True, False]
        config = {k: v for k, v in config.items() if k not in (key, interval)}
        assert [bool(family.rotary(config, layer).size) for layer in range(4)] == [True, True, True, False]
        assert [bool(family.rotary(config | {interval: 3}, layer).size) for layer in range(3)] == [True, True, False]
