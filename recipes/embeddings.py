"""Embeddings and head apart while a model trains, where it ties them (arXiv 2505.03005), and together again after."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

UNTIE = (False, "tie", "keep")  # what a config may say, the last two of the end


def untie(model: PreTrainedModel) -> None:
    """Gives the head a weight of its own, equal to the embeddings', in place.

    ValueError for a model whose head has one already.
    """
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if inputs.weight is not outputs.weight:
        raise ValueError(
            f"untie_embeddings is for models that tie embeddings and head; this {type(model).__name__} does not, so "
            "leave it false"
        )
    outputs.weight = nn.Parameter(outputs.weight.detach().clone())
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False


@torch.no_grad()
def tie(model: PreTrainedModel) -> None:
    """Embeddings and head become their mean and one tensor again, in place: an approximation."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    inputs.weight.copy_((inputs.weight + outputs.weight) / 2)
    outputs.weight = inputs.weight
    model.config.get_text_config().tie_word_embeddings = True
    model.config.tie_word_embeddings = True
