"""Packed batches: documents side by side in one row, none of which sees another, and what runs a model on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # the label of a token that nothing predicts: the first of each document's piece

# input_ids [1, T] int64; labels [1, T], the same with IGNORED at the first token of each piece; position_ids [1, T],
# from 0 in each piece; cu_seqlens [N + 1] int32, where the pieces begin and the last one ends.
Batch = Mapping[str, Tensor]

# Attention implementations that read the documents' boundaries from the keyword arguments below.
TAKES_BOUNDARIES = {"attnzoo", "flash_attention_2", "flash_attention_3", "flash_attention_4"}
# Models whose layers, on "attnzoo", know all of their mask themselves: causal, and a window that they name.
KNOWS_ITS_MASK = {"cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama"}
KNOWS_ITS_MASK |= {
    "ministral",
    "mistral",
    "nemotron",
    "olmo",
    "olmo2",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "stablelm",
}


def pack(pieces: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """One batch of pieces of documents, each a 1-D array of token ids. No pieces give a token that trains nothing."""
    filler = [] if pieces else [np.zeros(1, dtype=np.int64)]
    lengths = [len(piece) for piece in [*pieces, *filler]]
    input_ids = torch.from_numpy(np.concatenate([*pieces, *filler]).astype(np.int64))
    boundaries = torch.tensor([0, *lengths]).cumsum(0)
    labels = input_ids.clone()
    labels[boundaries[:-1]] = IGNORED
    return {
        "input_ids": input_ids[None],
        "labels": labels[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seqlens": boundaries.to(torch.int32),
    }


def forward_packed(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [1, T, vocabulary] of a packed batch, every document read by itself.

    A model whose attention takes the boundaries gets the batch as it is; any other gets one piece after the other.
    The batch lies on the model's device.
    """
    if getattr(model.config, "_attn_implementation", None) in TAKES_BOUNDARIES:
        return model(**packed_inputs(batch, model.config)).logits
    starts = batch["cu_seqlens"].tolist()
    pieces = [batch["input_ids"][:, start:end] for start, end in pairwise(starts)]
    return torch.cat([model(input_ids=piece, use_cache=False).logits for piece in pieces], dim=1)


def hidden_packed(model: nn.Module, batch: Batch) -> Tensor:
    """What goes into the head, [T, dim], of a packed batch; every document is read by itself, as in `forward_packed`.

    The model itself is called and not its base model, since a model in shards gathers them in its own call. It computes
    the logits of a single token.
    """
    kept = _last_hidden(model)
    if getattr(model.config, "_attn_implementation", None) in TAKES_BOUNDARIES:
        model(**packed_inputs(batch, model.config), logits_to_keep=1)
        return kept.pop()[0]
    pieces = []
    for start, end in pairwise(batch["cu_seqlens"].tolist()):
        model(input_ids=batch["input_ids"][:, start:end], use_cache=False, logits_to_keep=1)
        pieces.append(kept.pop()[0])
    return torch.cat(pieces)


class _LastHidden:
    """A hook on the base model, there for good, so that compiled code has it too; it holds no tensor between calls."""

    hidden: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        self.hidden = out.last_hidden_state

    def pop(self) -> Tensor:
        hidden, self.hidden = self.hidden, None
        assert hidden is not None
        return hidden


def _last_hidden(model: nn.Module) -> _LastHidden:
    hooks = [hook for hook in model.base_model._forward_hooks.values() if isinstance(hook, _LastHidden)]
    if not hooks:
        hooks = [_LastHidden()]
        model.base_model.register_forward_hook(hooks[0])
    return hooks[0]


def packed_inputs(batch: Batch, config: Any) -> dict[str, Any]:
    """The keyword arguments by which transformers hands a packed batch to the attention of a model with `config`."""
    boundaries, positions = batch["cu_seqlens"], batch["position_ids"]
    torch._dynamo.maybe_mark_dynamic(boundaries, 0)  # or compiled layers would be compiled again for other documents
    inputs = {
        "input_ids": batch["input_ids"],
        "position_ids": positions,
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "use_cache": False,
    }
    knows = config._attn_implementation == "attnzoo" and config.model_type.removeprefix("attnzoo_") in KNOWS_ITS_MASK
    if not knows:
        longest = int(boundaries.diff().max())  # waits for the device
        return inputs | {"max_length_q": longest, "max_length_k": longest}
    # The boundaries say it all. A mask that says nothing keeps transformers from looking for them in the positions,
    # which waits for the device.
    nothing = torch.zeros((1, 1, 1, positions.shape[1]), dtype=torch.int32, device=positions.device)
    return inputs | {"attention_mask": nothing}


def shifted_labels(batch: Batch) -> Tensor:
    """int64 [T]: at each position the token that comes next, IGNORED where a document's piece ends."""
    return F.pad(batch["labels"][0, 1:], (0, 1), value=IGNORED)


def count_targets(batch: Batch) -> Tensor:
    """int64 scalar: how many tokens of the batch are predicted."""
    return (shifted_labels(batch) != IGNORED).sum()
