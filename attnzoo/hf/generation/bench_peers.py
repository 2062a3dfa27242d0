"""Transformers' side of `attnzoo bench generation`: its own `generate` with each way to decode that it comes with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

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
# Attention implementation and cache; `generate` compiles steps over a static cache by itself.
HOWS: dict[str, tuple[str, type[Cache]]] = {
    "sdpa, static cache, compiled": ("sdpa", StaticCache),
    "flex_attention, static cache, compiled": ("flex_attention", StaticCache),
    "sdpa, dynamic cache": ("sdpa", DynamicCache),
}


def ways(mechanism: str, batch: int, length: int) -> list[str]:
    """Those that are worth the time; none where transformers does not have the mechanism.

    Of large caches a dynamic one is left out, since all of it is copied at each step, and FlexAttention over what
    latents expand to, which at 16 rows took longer than SDPA.
    """
    if mechanism not in PEERS:
        return []
    large = batch * length > 2**18
    slow = {"sdpa, dynamic cache"} | ({"flex_attention, static cache, compiled"} if mechanism == "MLA" else set())
    return [how for how in HOWS if not (large and how in slow)]


def peer_model(mechanism: str, how: str) -> PreTrainedModel:
    """The stock model of a mechanism."""
    return common.random_model(*PEERS[mechanism], lambda model: model.set_attn_implementation(HOWS[how][0]))


@torch.no_grad()
def theirs(mechanism: str, how: str, batch: int, length: int, lock: common.Lock) -> dict[str, Any]:
    """Milliseconds a step of transformers' `generate`."""
    with lock.shared():
        torch._dynamo.reset()
        model = peer_model(mechanism, how)
        cache = filled(model, how, batch, length)
        return {"generate_ms": common.clocked_generate(model, cache, batch, length, lock)}


def filled(model: PreTrainedModel, how: str, batch: int, length: int) -> Any:
    """A cache of `length` random tokens a row."""
    kind = HOWS[how][1]
    static = kind is StaticCache
    cache: Any = kind(model.config, max_cache_len=common.room(length)) if static else kind(config=model.config)  # type: ignore[call-arg]
    # The first tokens make the memory.
    model(input_ids=torch.ones(batch, 1, dtype=torch.int64, device=common.DEVICE), past_key_values=cache)
    for layer in cache.layers:
        if static:
            layer.keys.normal_()
            layer.values.normal_()
        else:
            kept = min(length, layer.sliding_window - 1) if layer.is_sliding else length
            layer.keys, layer.values = (
                torch.randn(*t.shape[:2], kept, t.shape[3], dtype=t.dtype, device=t.device)
                for t in (layer.keys, layer.values)
            )
        for name in ("cumulative_length", "cumulative_length_int"):
            if isinstance(counted := getattr(layer, name, None), torch.Tensor):
                counted.fill_(length)
            elif counted is not None:
                setattr(layer, name, length)
    return cache
