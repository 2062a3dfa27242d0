"""Rotary embeddings against transformers' functions and against complex numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotary
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary

from attnzoo.layers import RotaryEmbedding, apply_rotary
from tests.layers.naive import rotate

LINEAR = {"rope_type": "linear", "factor": 2.5}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
SCALINGS = [
    LINEAR,
    DYNAMIC,
    LLAMA3,
    YARN,
    {**YARN, "attention_factor": 1.25},
    {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 24, "beta_slow": 2, "truncate": False},
    {**YARN, "factor": 0.5},
    {**YARN, "partial_rotary_factor": 0.5},
    {**LLAMA3, "partial_rotary_factor": 0.5},
]


def llama_config(scaling: dict[str, Any], head_dim: int = 32, theta: float = 50000.0) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=128,
        rope_parameters={"rope_theta": theta, **scaling},
    )


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_frequencies_and_attention_factor_are_those_of_transformers(scaling: dict[str, Any]) -> None:
    config = llama_config(scaling)
    theirs, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    rope = RotaryEmbedding(32, base=50000.0, scaling=scaling, max_position_embeddings=128)
    torch.testing.assert_close(rope.inv_freq, theirs, rtol=3e-7, atol=0)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    "scaling", [{"rope_type": "default"}, LINEAR, DYNAMIC, LLAMA3, YARN], ids=lambda s: s["rope_type"]
)
def test_rotation_is_llamas_also_past_the_trained_length(scaling: dict[str, Any]) -> None:
    q, k = torch.randn(2, 3, 300, 32), torch.randn(2, 1, 300, 32)
    positions = torch.arange(300).expand(2, 300)
    cos, sin = LlamaRotaryEmbedding(llama_config(scaling))(q, positions)
    theirs = llama_rotary(q, k, cos, sin)
    # As configs hold it: with rope_theta inside.
    rope = RotaryEmbedding(32, scaling={"rope_theta": 50000.0, **scaling}, max_position_embeddings=128)
    for ours, expected in zip((q, k), theirs, strict=True):
        torch.testing.assert_close(apply_rotary(ours, *rope(positions)), expected, rtol=1e-4, atol=3e-5)


def test_interleaved_partial_rotation_is_gptjs() -> None:
    x = torch.randn(2, 3, 11, 24, dtype=torch.float64)
    rope = RotaryEmbedding(24, rotary_dim=10, layout="interleaved")
    cos, sin = rope(torch.arange(5, 16).expand(2, 11), dtype=torch.float64)
    theirs = gptj_rotary(x[..., :10].transpose(1, 2), sin, cos).transpose(1, 2)
    ours = apply_rotary(x, cos, sin, "interleaved")
    torch.testing.assert_close(ours[..., :10], theirs)
    assert torch.equal(ours[..., 10:], x[..., 10:])


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [2, 12, 18])
def test_rotation_in_fp64_is_multiplication_by_complex_numbers(layout: Any, rotary_dim: int) -> None:
    x = torch.randn(1, 1, 5, 18, dtype=torch.float64)
    positions = torch.tensor([0, 1, 7, 1000, 100_000])
    rope = RotaryEmbedding(18, base=500.0, rotary_dim=rotary_dim, layout=layout)
    ours = apply_rotary(x, *rope(positions, dtype=torch.float64), layout)
    torch.testing.assert_close(ours[0, 0], rotate(x[0, 0], positions, 500.0, rotary_dim, layout), rtol=0, atol=1e-9)


def test_half_precision_inputs_are_rotated_by_fp32_angles() -> None:
    x = torch.randn(1, 2, 4, 16)
    positions = torch.tensor([4093, 4094, 4095, 4096])  # bf16 knows no odd number up here
    cos, sin = RotaryEmbedding(16).bfloat16()(positions)
    assert cos.dtype == torch.float32
    ours = apply_rotary(x.bfloat16(), cos, sin)
    truth = apply_rotary(x.bfloat16().double(), *RotaryEmbedding(16)(positions, dtype=torch.float64))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), truth, rtol=2**-8, atol=2e-3)


def test_frequencies_survive_casts_and_empty_storage() -> None:
    fresh = RotaryEmbedding(16, scaling=LLAMA3).inv_freq
    for moved in (
        RotaryEmbedding(16, scaling=LLAMA3).bfloat16(),
        RotaryEmbedding(16, scaling=LLAMA3).to(torch.float64),
        RotaryEmbedding(16, scaling=LLAMA3).to("meta").to_empty(device="cpu"),
    ):
        assert moved.inv_freq.dtype == torch.float32
        assert torch.equal(moved.inv_freq, fresh)
    assert "inv_freq" not in RotaryEmbedding(16).state_dict()


def test_dynamic_scaling_looks_at_each_row_alone() -> None:
    rope = RotaryEmbedding(16, scaling=DYNAMIC, max_position_embeddings=8)
    plain = RotaryEmbedding(16)
    short, long = torch.arange(6), torch.arange(10, 16)
    cos, _ = rope(torch.stack([short, long]))
    torch.testing.assert_close(cos[0], plain(short)[0])
    torch.testing.assert_close(cos[1], rope(long)[0])
    assert not torch.allclose(cos[1], plain(long)[0])
    told, _ = rope(short, lengths=torch.tensor([16]))  # tokens at 0 to 5 of a sequence of 16
    torch.testing.assert_close(told, rope(torch.arange(16))[0][:6])


def test_yarn_without_a_factor_takes_it_from_the_lengths() -> None:
    scaling = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}
    derived = RotaryEmbedding(16, scaling=scaling, max_position_embeddings=128)
    given = RotaryEmbedding(16, scaling={**scaling, "factor": 4.0})
    assert torch.equal(derived.inv_freq, given.inv_freq)
    assert derived.attention_factor == given.attention_factor > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotary_dim": 7}, "rotary_dim is 7"),
        ({"rotary_dim": 18}, "rotary_dim is 18"),
        ({"rotary_dim": 0}, "rotary_dim is 0"),
        ({"rotary_dim": 2, "scaling": {**DYNAMIC, "original_max_position_embeddings": 8}}, "rotary_dim is 2"),
        ({"layout": "pairs"}, "layout is 'pairs'"),
        ({"scaling": {"rope_type": "longrope"}}, "rope_type'] is 'longrope'"),
        ({"scaling": {"type": "llama3", "factor": 8.0}}, "lacks high_freq_factor, low_freq_factor"),
        ({"scaling": DYNAMIC}, "lacks original_max_position_embeddings"),
        ({"scaling": {**LINEAR, "mrope_section": [4, 2, 2]}}, "no entry mrope_section"),
        ({"scaling": {**LINEAR, "rope_theta": 5.0}, "base": 6.0}, "base is 6.0 but"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="(?s)" + message.replace("[", r"\[").replace("]", r"\]")):
        RotaryEmbedding(16, **options)


def test_an_odd_head_cannot_rotate_whole() -> None:
    with pytest.raises(ValueError, match="rotary_dim is 15"):
        RotaryEmbedding(15)
