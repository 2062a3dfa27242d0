"""The next token of each row, by operations that a CUDA graph can hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# What `model.generate` does and `attnzoo.hf.generate` does not, with the value that asks for nothing.
_OTHERS: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "min_new_tokens": (None, 0),
    "guidance_scale": (None, 1.0),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "sequence_bias": (None,),
    "stop_strings": (None,),
    "watermarking_config": (None,),
    "prompt_lookup_num_tokens": (None,),
    "penalty_alpha": (None, 0.0),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "return_dict_in_generate": (None, False),
}


def chooser(config: GenerationConfig) -> Callable[[Tensor], Tensor]:
    """The function from logits `[B, vocabulary]` to tokens `[B]` that a generation config asks for.

    Sampling is by exponential races, as `torch.multinomial` does it for one sample, without its look at the weights.

    Raises:
        ValueError: for what only `model.generate` does.
    """
    for name, nothing in _OTHERS.items():
        value = getattr(config, name, None)
        if value not in nothing:
            raise ValueError(
                f"{name} is {value!r}, which attnzoo.hf.generate does not do; "
                "use model.generate inside `with attnzoo.hf.graphed(model)`"
            )
    if not config.do_sample:
        return lambda logits: logits.float().argmax(dim=-1)
    warpers: list[LogitsProcessor] = []
    if config.temperature not in (None, 1.0):
        warpers.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        warpers.append(TopKLogitsWarper(top_k=config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p=config.top_p))
    if config.min_p is not None:
        warpers.append(MinPLogitsWarper(min_p=config.min_p))

    def sample(logits: Tensor) -> Tensor:
        scores = logits.float()
        for warper in warpers:
            scores = warper(None, scores)  # type: ignore[arg-type]  # these read no tokens
        weights = torch.softmax(scores, dim=-1)
        return (weights / torch.empty_like(weights).exponential_(1)).argmax(dim=-1)

    return sample
