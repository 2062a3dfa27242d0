"""Latent attention against transformers' own modules, with their weights.

Those compute norms, angles and rotations in fp32 whatever they are given, which in fp64 leaves a difference of about
1e-7. So the strict comparison runs their unchanged code with every cast to fp32 turned into one to fp64; the same
weights are compared in fp32, nothing changed, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config, DynamicCache, modeling_rope_utils
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from attnzoo.caches import LatentCache
from attnzoo.layers import MultiHeadLatentAttention, RotaryEmbedding

DIM, HEADS, RANK, NOPE, ROPE, VALUE, LENGTH = 32, 4, 12, 8, 8, 6, 24

YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "mscale": 0.8,
    "mscale_all_dim": 1.3,
}

# (family, what its config has beside the sizes)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("deepseek_v3", {}),
    ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True, "rope_parameters": YARN}),
    ("deepseek_v3", {"rope_interleave": False, "rope_parameters": {**YARN, "mscale": 1.3}}),
    ("deepseek_v2", {"attention_bias": True}),
    ("deepseek_v2", {"q_lora_rank": None, "rope_parameters": YARN}),
    ("minicpm3", {}),
    (
        "minicpm3",
        {"q_lora_rank": None, "attention_bias": True, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    ),
    ("youtu", {"attention_bias": True, "rope_parameters": {**YARN, "mscale": None, "mscale_all_dim": None}}),
]


class Fp64Torch:
    """`torch`, where fp32 is called fp64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def casts_to_fp64(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> Iterator[None]:
    """What `modules` write as fp32 is fp64 in here."""
    with monkeypatch.context() as patch:
        for module in modules:
            patch.setattr(module, "torch", Fp64Torch())
        patch.setattr(Tensor, "float", Tensor.double)
        yield


def stock(family: str, changes: dict[str, Any]) -> tuple[Any, Any, torch.nn.Module, torch.nn.Module]:
    """(module, config, attention, rotary embedding) of transformers, on random weights."""
    if family == "deepseek_v3":
        module, config_class = modeling_deepseek_v3, DeepseekV3Config
    elif family == "deepseek_v2":
        module, config_class = modeling_deepseek_v2, DeepseekV2Config
    else:
        module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
        config_class = getattr(module, {"minicpm3": "MiniCPM3", "youtu": "Youtu"}[family] + "Config")
    rope = {"rope_theta": 1000.0, "rope_type": "default", **changes.get("rope_parameters", {})}
    sizes = {"hidden_size": DIM, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "q_lora_rank": 10}
    sizes |= {"kv_lora_rank": RANK, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": VALUE}
    sizes |= {"max_position_embeddings": 128, "attn_implementation": "sdpa"}
    config = config_class(**{**sizes, **changes, "rope_parameters": rope})
    name = {"deepseek_v3": "DeepseekV3", "deepseek_v2": "DeepseekV2", "minicpm3": "MiniCPM3", "youtu": "Youtu"}[family]
    torch.manual_seed(0)
    attention = getattr(module, f"{name}Attention")(config, 0).eval()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module, config, attention, getattr(module, f"{name}RotaryEmbedding")(config)


def ours_like(config: Any, theirs: torch.nn.Module) -> MultiHeadLatentAttention:
    """Our layer as the config says, with their weights."""
    interleaved = config.model_type == "deepseek_v2" or getattr(config, "rope_interleave", False)
    rope = RotaryEmbedding(
        config.qk_rope_head_dim,
        scaling=config.rope_parameters,
        layout="interleaved" if interleaved else "half",
        max_position_embeddings=config.max_position_embeddings,
    )
    layer = MultiHeadLatentAttention(
        config.hidden_size,
        config.num_attention_heads,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        q_lora_rank=config.q_lora_rank,
        rope=rope,
        bias=config.attention_bias,
    ).to(next(theirs.parameters()).dtype)
    layer.load_state_dict(theirs.state_dict())
    return layer.eval()


def run_theirs(theirs: Any, rotary: Any, x: Tensor, start: int = 0, cache: DynamicCache | None = None) -> Tensor:
    """Their attention over `x`, which stands at positions from `start` on, after what the cache holds."""
    at = torch.arange(start, start + x.shape[1])
    causal = at[:, None] >= torch.arange(start + x.shape[1])
    places = at.expand(x.shape[0], -1)
    mask = causal.expand(x.shape[0], 1, -1, -1)
    out, _ = theirs(x, position_embeddings=rotary(x, places), attention_mask=mask, past_key_values=cache)
    return out


@pytest.mark.parametrize(
    ("family", "changes"), CASES, ids=lambda case: case if isinstance(case, str) else "-".join(case)
)
def test_stock_weights_give_stock_outputs_in_fp64_and_fp32(
    family: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, config, theirs, rotary = stock(family, changes)
    x = torch.randn(2, LENGTH, DIM)
    ours = ours_like(config, theirs)
    with torch.no_grad():
        expected = run_theirs(theirs, rotary, x)
        for form in ("materialised", "absorbed"):
            torch.testing.assert_close(ours(x, form=form), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    with torch.no_grad(), casts_to_fp64(monkeypatch, module, modeling_rope_utils):
        rotary = type(rotary)(config)
        theirs, ours, x = theirs.double(), ours.double(), x.double()
        expected = run_theirs(theirs, rotary, x)
        assert expected.dtype == torch.float64 and expected.abs().mean() > 0.05
        for form in ("materialised", "absorbed"):
            torch.testing.assert_close(ours(x, form=form), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("family", "changes"), CASES[1:6:2], ids=lambda case: case if isinstance(case, str) else "")
def test_decoding_with_our_cache_is_decoding_with_theirs(
    family: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, config, theirs, rotary = stock(family, changes)
    theirs, x = theirs.double(), torch.randn(2, LENGTH, DIM, dtype=torch.float64)
    ours, cache, peer = (
        ours_like(config, theirs),
        LatentCache(2, LENGTH, RANK, ROPE, dtype=torch.float64),
        DynamicCache(),
    )
    with torch.no_grad(), casts_to_fp64(monkeypatch, module, modeling_rope_utils):
        rotary = type(rotary)(config)
        for start, end in ((0, 9), (9, 16), (16, 17), (17, 18), (18, 21), (21, LENGTH)):
            new = x[:, start:end]
            expected = run_theirs(theirs, rotary, new, start, peer)
            torch.testing.assert_close(ours(new, cache=cache), expected, rtol=0, atol=1e-9)
    latent, rope_key = cache.view()
    held = peer.layers[0]
    if held.keys.shape[1] != 1:
        return  # older releases cache every head's keys and values
    assert latent.shape == held.keys.shape and rope_key.shape == held.values.shape
    torch.testing.assert_close(latent, held.keys, rtol=0, atol=1e-12)
    # Where pairs are interleaved, transformers' V3 keeps them apart in the cache: the same numbers in another order.
    torch.testing.assert_close(rope_key.sort(-1).values, held.values.sort(-1).values, rtol=0, atol=1e-12)
    assert cache.nbytes == held.keys.nbytes + held.values.nbytes


def test_yarn_scales_the_softmax_where_deepseek_does() -> None:
    sizes: dict[str, int] = {"kv_lora_rank": RANK, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": 6}

    def scale(scaling: dict[str, Any] | None, **options: Any) -> float:
        rope = RotaryEmbedding(ROPE, scaling=scaling)
        return MultiHeadLatentAttention(DIM, HEADS, rope=rope, **sizes, **options).scale

    plain = 16**-0.5
    assert scale(None) == scale({**YARN, "mscale_all_dim": None}) == scale({**YARN, "factor": 1.0}) == plain
    assert scale(YARN) == pytest.approx(plain * (0.1 * 1.3 * 2.0794415416798357 + 1) ** 2)
    assert scale(YARN, scale=0.5) == 0.5
    assert MultiHeadLatentAttention(DIM, HEADS, **sizes).scale == plain
