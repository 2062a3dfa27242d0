"""What a model's cache holds and how fast the model reads and writes."""

from __future__ import annotations

import time
from collections.abc import Callable
from inspect import signature
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

PREFILL_RUNS = 3
DECODE_STEPS = 16


def cache_bytes_per_token(model: nn.Module, prompt_tokens: int) -> float:
    """Bytes that each token after the first adds to the cache of one sequence, measured on the caches themselves.

    A window that is shorter than the prompt therefore counts less, and a state that does not grow counts nothing.
    """
    if prompt_tokens < 2:
        raise ValueError(f"prompt_tokens is {prompt_tokens}; it must be at least 2")
    return (_cache_bytes(model, prompt_tokens) - _cache_bytes(model, 1)) / (prompt_tokens - 1)


def measure_speed(model: nn.Module, prompt_tokens: int) -> tuple[float, float]:
    """Median tokens/s of reading a random prompt and of writing on after it, one sequence, after a warm-up."""
    ids = random_prompt(model, prompt_tokens)
    _prefill(model, ids)
    prefill = [_seconds(ids.device, lambda: _prefill(model, ids)) for _ in range(PREFILL_RUNS)]
    cache = _prefill(model, ids)
    token = ids[:, :1]
    write = lambda: model(input_ids=token, past_key_values=cache, use_cache=True)  # noqa: E731
    write()
    decode = [_seconds(ids.device, write) for _ in range(DECODE_STEPS)]
    return prompt_tokens / median(prefill), 1 / median(decode)


def _prefill(model: nn.Module, ids: Tensor) -> Any:
    # As in generation, which needs the logits of the last token alone; some models of others cannot be told so.
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    return model(input_ids=ids, use_cache=True, **last).past_key_values


def _cache_bytes(model: nn.Module, tokens: int) -> int:
    cache = _prefill(model, random_prompt(model, tokens))
    if cache is None:
        raise ValueError(f"{type(model).__name__} gives no cache although use_cache is true")
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(cache, seen=set()))


def _tensors(thing: Any, seen: set[int]) -> list[Tensor]:
    """All tensors in an object, each once."""
    if id(thing) in seen:
        return []
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, nn.Module | str | bytes | torch.device | torch.dtype | type):
        return []
    if isinstance(thing, dict):
        inside = list(thing.values())
    elif isinstance(thing, list | tuple | set):
        inside = list(thing)
    else:
        inside = list(getattr(thing, "__dict__", {}).values())
    return [tensor for item in inside for tensor in _tensors(item, seen)]


def random_prompt(model: nn.Module, tokens: int) -> Tensor:
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)


def _seconds(device: torch.device, work: Callable[[], Any]) -> float:
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
