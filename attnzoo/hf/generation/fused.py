"""Small pieces of a model as one kernel each while a step is captured: beside the products, launches cost most."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

# Functions that rotate queries and keys, under the names that model files and this package import them by.
_ROTATIONS = ("apply_rotary_pos_emb", "apply_rotary")


@contextmanager
def fused(model: nn.Module, really: bool = True) -> Iterator[None]:
    """While it lasts, RMS norms, MLPs and rotations of `model` run compiled; what is compiled is kept.

    The same function serves all layers, and is compiled anew for another shape only. Not for training, nor for two
    threads at once.
    """
    with ExitStack() as stack:
        if really:
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=64))
            for module in model.modules():
                if type(module).__name__.endswith(("RMSNorm", "MLP")) and not module._forward_hooks:
                    quick = partial(_compiled(type(module).forward), module)
                    stack.enter_context(patch.object(module, "forward", quick))
            files = {type(module).__module__ for module in model.modules() if "Attention" in type(module).__name__}
            for file in files:
                for name in _ROTATIONS:
                    if callable(rotate := getattr(sys.modules[file], name, None)):
                        stack.enter_context(patch.object(sys.modules[file], name, _compiled(rotate)))
        yield


@lru_cache(maxsize=64)
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)
