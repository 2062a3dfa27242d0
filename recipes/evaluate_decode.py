"""How fast a model writes many sequences at once with a long cache, which is where key/value heads count."""

from __future__ import annotations

import time

import torch
from torch import nn

from recipes.evaluate_speed import random_prompt, wait_for


@torch.no_grad()
def decode_speed(model: nn.Module, *, batch: int, length: int, tokens: int = 32) -> float:
    """Tokens/s of all sequences together, each with `length` tokens in its cache, greedy, by attnzoo.hf.generate.

    The time of the prompt is taken off: it is the difference of two calls, one of which writes a single token. The
    cache is in the model's dtype or in that of the autocast around the call.

    Raises:
        ValueError: for a model without attn_implementation="attnzoo".
    """
    from attnzoo.hf import generate

    if getattr(model.config, "_attn_implementation", None) != "attnzoo":
        raise ValueError("evaluate.decode needs model.attn_implementation=attnzoo")
    ids = random_prompt(model, length).expand(batch, length).contiguous()

    def seconds(new: int) -> float:
        wait_for(ids.device)
        start = time.perf_counter()
        generate(model, ids, max_new_tokens=new, do_sample=False, eos_token_id=None)
        wait_for(ids.device)
        return time.perf_counter() - start

    seconds(4)  # compiles and captures
    taken = min(seconds(1 + tokens) for _ in range(2)) - min(seconds(1) for _ in range(2))
    return batch * tokens / taken
