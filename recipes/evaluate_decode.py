"""How fast a model writes many sequences at once with a long cache, which is where key/value heads count."""

from __future__ import annotations

import copy
import time

import torch
from transformers import PreTrainedModel

from recipes.evaluate_speed import random_prompt, wait_for

FIRST = 4  # tokens: of the prompt, of a step that runs, of one that is captured, of one that is replayed


@torch.no_grad()
def decode_speed(model: PreTrainedModel, *, batch: int, length: int, tokens: int = 64) -> float:
    """Tokens/s of all sequences together, each with `length` tokens in its cache, greedy, by attnzoo.hf.generate.

    The prompt and the first tokens, with which steps are captured, are taken off: it is the difference of two calls. On
    a GPU weights and cache are bfloat16.

    Raises:
        ValueError: for a model without attn_implementation="attnzoo".
    """
    from attnzoo.hf import generate

    if getattr(model.config, "_attn_implementation", None) != "attnzoo":
        raise ValueError("evaluate.decode needs model.attn_implementation=attnzoo")
    if model.device.type == "cuda":
        model = copy.deepcopy(model).to(torch.bfloat16)
    ids = random_prompt(model, length).expand(batch, length).contiguous()

    def seconds(new: int) -> float:
        wait_for(ids.device)
        start = time.perf_counter()
        generate(model, ids, max_new_tokens=new, do_sample=False, eos_token_id=None)
        wait_for(ids.device)
        return time.perf_counter() - start

    with torch.autocast(ids.device.type, enabled=False):
        seconds(FIRST)  # compiles
        taken = min(seconds(FIRST + tokens) for _ in range(2)) - min(seconds(FIRST) for _ in range(2))
    return batch * tokens / taken
