"""What a model writes: greedy continuations of fixed prompts, to be read beside those of other models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase


@torch.no_grad()
def write_on(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], tokens: int
) -> dict[str, str]:
    """By prompt, the `tokens` most likely next tokens as text, less where the model ends its text.

    The prompts are read as they stand, without a chat template; nothing of the model's own generation config applies.
    """
    device = next(model.parameters()).device
    greedy = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    written = {}
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)["input_ids"].to(device)
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        written[prompt] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return written
