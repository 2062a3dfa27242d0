"""How fast a model writes many sequences at once with a long cache, which is where key/value heads count."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recipes.evaluate_speed import random_prompt, wait_for

FIRST = 4  # steps before the clock starts: one runs, one is captured, and the rest warm up
ROUNDS = 3


@torch.no_grad()
def decode_speed(model: PreTrainedModel, *, batch: int, length: int, tokens: int = 64) -> float:
    """Tokens/s of all sequences together, each with `length` tokens in its cache, by the steps of attnzoo.hf.generate.

    Only steps are timed, the most likely token each: rounds of `tokens` of them, whose median counts. On a GPU weights
    and cache are bfloat16.

    Raises:
        ValueError: for a model without attn_implementation="attnzoo".
    """
    if getattr(model.config, "_attn_implementation", None) != "attnzoo":
        raise ValueError("evaluate.decode needs model.attn_implementation=attnzoo")
    if model.device.type == "cuda":
        model = copy.deepcopy(model).to(torch.bfloat16)
    ids = random_prompt(model, length).expand(batch, length).contiguous()
    with torch.autocast(ids.device.type, enabled=False):
        step = _step(model, ids, FIRST + ROUNDS * tokens)
        for _ in range(FIRST):
            step()
        taken = []
        for _ in range(ROUNDS):
            wait_for(ids.device)
            start = time.perf_counter()
            for _ in range(tokens):
                step()
            wait_for(ids.device)
            taken.append(time.perf_counter() - start)
    return batch * tokens / median(taken)


def _step(model: PreTrainedModel, ids: Tensor, steps: int) -> Callable[[], Any]:
    """What writes one token a row after the prompt `[B, S]`: a replayed CUDA graph where steps can be captured."""
    from attnzoo.hf.generation.build import cache_for
    from attnzoo.hf.generation.graph import Step, refusal

    batch, length = ids.shape
    cache = cache_for(model, batch, length + steps, "rolling")
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    token = logits[:, -1:].argmax(-1)
    if ids.is_cuda and refusal(model, cache) is None:
        step = Step(model, cache, choose=lambda logits: logits.argmax(-1))
        step.tokens.copy_(token)
        return step

    def run() -> None:
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(-1))

    return run
