"""What every test leaves behind: nothing. And where there is no GPU, kernels run under Triton's interpreter."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported: it decides how they are built


@pytest.fixture(autouse=True)
def hydra_leaves_no_log_handlers() -> Iterator[None]:
    """A command that ran in this process logs into its run folder for ever after, even when the folder is gone."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in before]:
        # pytest's own handlers are subclasses of these.
        if type(handler) in (logging.FileHandler, logging.StreamHandler):
            root.removeHandler(handler)
            handler.close()
    root.setLevel(level)
