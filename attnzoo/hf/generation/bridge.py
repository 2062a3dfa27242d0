"""`graphed`: transformers' own `generate` over caches and captured steps of attnzoo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any
from unittest.mock import patch

from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from attnzoo.hf.generation.build import Kind, cache_for
from attnzoo.hf.generation.cache import HeldCache
from attnzoo.hf.generation.graph import Step, refusal


@contextmanager
def graphed(model: PreTrainedModel, *, fuse: bool = False) -> Iterator[PreTrainedModel]:
    """While it lasts, `model.generate` decodes over a cache of attnzoo and replays one CUDA graph a token.

    Without `past_key_values` it gets the fastest cache that rounds nothing, with room for the call's `max_length`: of
    `cache_for`'s kind "rolling", or "contiguous" where guesses of assisted decoding have to be taken back. A model that
    `cache_for` refuses keeps transformers' own, as does a call with `cache_implementation` or `use_cache=False`.

    Everything else of `generate` is as ever: logits processors, stopping criteria, streamers. Prompts run as they come,
    and so do steps that cannot be captured: those of beams, of caches that `refusal` names, and without a GPU.

    Args:
        model: whose `forward` is stood in for.
        fuse: as of `Step`.
    """
    forward, prepare = model.forward, model._prepare_cache_for_generation
    last: tuple[Step, int] | None = None  # and how often rows had moved then

    @wraps(forward)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        nonlocal last
        cache: Any = kwargs.get("past_key_values")
        tokens = kwargs.get("input_ids")
        step = last[0] if last is not None and last[0].cache is cache and last[1] == cache.moved else None
        taken = not args and _is_step(cache, tokens, kwargs)
        if not taken or ((step is None or cache.stepping is not step) and refusal(model, cache) is not None):
            if isinstance(cache, HeldCache):
                cache.settle()
            last = None  # what runs now may put states into new memory
            return forward(*args, **kwargs)
        if step is None:
            step = Step(model, cache, fuse=fuse)
            last = step, cache.moved
        model.forward = forward
        try:
            logits = step(tokens)
        finally:
            model.forward = stand_in
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    @wraps(prepare)
    def with_cache(config: Any, kwargs: dict[str, Any], mode: Any, batch_size: int, length: int, *rest: Any) -> Any:
        own = config.cache_implementation or config.use_cache is False or config.is_assistant
        if kwargs.get("past_key_values") is None and not own:
            rows = batch_size * max(config.num_beams or 1, config.num_return_sequences or 1)
            kind: Kind = "contiguous" if mode == GenerationMode.ASSISTED_GENERATION else "rolling"
            with suppress(ValueError):
                kwargs["past_key_values"] = cache_for(model, rows, length, kind)
        return prepare(config, kwargs, mode, batch_size, length, *rest)

    with patch.object(model, "forward", stand_in), patch.object(model, "_prepare_cache_for_generation", with_cache):
        try:
            yield model
        finally:
            if last is not None:
                last[0].leave()


def _is_step(cache: Any, tokens: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call is one token a row over a cache of ours, and asks for nothing but logits."""
    mask = kwargs.get("attention_mask")
    more = any(kwargs.get(name) for name in ("output_attentions", "output_hidden_states", "labels"))
    return (
        isinstance(cache, HeldCache)
        and isinstance(tokens, Tensor)
        and _on_gpu(tokens)
        and tokens.shape == (cache.rows, 1)
        and cache.get_seq_length() > 0
        and not cache.beams
        and (mask is None or mask.ndim == 2)
        and not more
    )


def _on_gpu(tokens: Tensor) -> bool:
    return tokens.is_cuda
