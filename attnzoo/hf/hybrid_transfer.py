"""Attention transfer through a model: each linear layer learns on the original's own activations, in order."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnzoo.conversion.calibration import Progress
from attnzoo.conversion.transfer import learned, transfer
from attnzoo.hf.blocks import Blocks, sharing
from attnzoo.hf.linear import SwappedLinearAttention
from attnzoo.hf.swap import rebuild
from attnzoo.specs import GQA

_TOKENS_A_STEP = 1024


def transfer_all(
    model: PreTrainedModel,
    changed: Blocks,
    tokens: Tensor,
    *,
    steps: int,
    seed: int,
    progress: Progress | None = None,
) -> None:
    """Train the maps of all linear layers of `changed`, in place (arXiv 2410.10254).

    Args:
        model: the original.
        changed: the same weights, with linear layers.
        tokens: calibration text `[rows, S]`.
        steps, seed: as of `transfer`.
        progress: told after each layer.
    """
    count = len(changed.blocks)
    linear = [number for number in range(count) if isinstance(changed.attention(number), SwappedLinearAttention)]
    if not linear or not learned(changed.attention(linear[0])):  # type: ignore[arg-type]
        return
    teacher_model = sharing(model)
    rebuild(teacher_model, [GQA()] * count)  # so that its heads can be looked at under one name in every family
    teacher = Blocks(teacher_model, changed.family)
    batches = [rows.to(model.device) for rows in tokens.split(max(1, _TOKENS_A_STEP // tokens.shape[1]))]
    with torch.no_grad():
        stream = [teacher.enter(rows) for rows in batches]
        for rows in batches:
            changed.prepare(rows)
    for number in range(linear[-1] + 1):
        if number in linear:
            with torch.no_grad():
                targets = [teacher.heads(number, hidden) for hidden in stream]
            transfer(
                changed.attention(number),  # type: ignore[arg-type]
                partial(_heads, changed, number, stream),
                targets,
                steps=steps,
                seed=seed,
            )
        with torch.no_grad():
            stream = [teacher.run(number, hidden) for hidden in stream]
        if progress is not None:
            progress(number + 1, linear[-1] + 1)


def _heads(blocks: Blocks, number: int, stream: list[Tensor], batch: int) -> Tensor:
    return blocks.heads(number, stream[batch])
