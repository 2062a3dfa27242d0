"""Transformers' side of `attnzoo bench generation`: its own `generate` with what is fastest of what it comes with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache

from attnzoo.hf.generation import bench_common as common

_DENSE = {"first_k_dense_replace": 16, "q_lora_rank": None, "rope_interleave": False}
# Model type, and what differs from the shape. Transformers has no linear attention in this shape, and no int8 cache
# that comes with it.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "MHA": ("llama", {}),
    "GQA-8": ("llama", {"num_key_value_heads": 8}),
    "MQA": ("llama", {"num_key_value_heads": 1}),
    "MLA": ("deepseek_v3", common.LATENT | _DENSE | {"head_dim": common.LATENT["qk_rope_head_dim"]}),
    "window 1k": ("mistral", {"num_key_value_heads": 8, "sliding_window": common.WINDOW}),
}
# With a static cache, over which `generate` compiles its steps by itself. A dynamic one is copied at each step: at 16
# rows that took 2.5 to 8 times as long. FlexAttention pays where SDPA, given a mask, has to repeat keys; elsewhere it
# took longer, and with 64 rows Triton was still at the kernel that makes its block mask after nearly three minutes.
# Implementation, mechanisms, most rows.
HOWS = {
    "sdpa, static cache, compiled": ("sdpa", tuple(PEERS), 2**20),
    "flex_attention, static cache, compiled": ("flex_attention", ("GQA-8", "MQA"), 16),
}


def ways(mechanism: str, batch: int) -> list[str]:
    """How transformers can decode with a mechanism and so many rows; none where it does not have it."""
    return [how for how, (_, mechanisms, most) in HOWS.items() if mechanism in mechanisms and batch <= most]


def peer_model(mechanism: str, how: str) -> PreTrainedModel:
    """The stock model of a mechanism."""
    return common.random_model(*PEERS[mechanism], lambda model: model.set_attn_implementation(HOWS[how][0]))


@torch.no_grad()
def theirs(mechanism: str, how: str, batch: int, length: int, lock: common.Lock) -> dict[str, Any]:
    """Milliseconds a step of transformers' `generate`."""
    with lock.shared():
        torch._dynamo.reset()
        model = peer_model(mechanism, how)
        cache = filled(model, batch, length)
        return {"generate_ms": common.clocked_generate(model, cache, batch, length, lock)}


def filled(model: PreTrainedModel, batch: int, length: int) -> StaticCache:
    """A static cache of `length` random tokens a row."""
    cache = StaticCache(model.config, max_cache_len=common.room(length))
    # The first tokens make the memory.
    model(input_ids=torch.ones(batch, 1, dtype=torch.int64, device=common.DEVICE), past_key_values=cache)
    for layer in cache.layers:
        layer.keys.normal_()  # type: ignore[union-attr]
        layer.values.normal_()  # type: ignore[union-attr]
        for name in ("cumulative_length", "cumulative_length_int"):
            if isinstance(counted := getattr(layer, name, None), torch.Tensor):
                counted.fill_(length)
            elif counted is not None:
                setattr(layer, name, length)
    return cache
