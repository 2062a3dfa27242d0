"""What tests on a GPU share."""

from __future__ import annotations

import zlib

import pytest
import torch


@pytest.fixture(autouse=True)
def own_seed(request: pytest.FixtureRequest) -> None:
    """Each test draws the same in every run, whatever ran before it."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))
