"""Making a new model like the one that it was made from, but for its weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel


def match(new: PreTrainedModel, old: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Give the new model the old one's device, dtypes, mode, `requires_grad` and generation config."""
    new.to(old.device)  # type: ignore[arg-type]
    flags = {name: parameter.requires_grad for name, parameter in old.named_parameters()}
    for name, parameter in new.named_parameters():
        if name in state:  # models may keep some weights in another dtype than the rest
            parameter.data = parameter.data.to(state[name].dtype)
        parameter.requires_grad_(flags.get(name, True))
    new.train(old.training)
    if old.can_generate():
        new.generation_config = copy.deepcopy(old.generation_config)
