"""What all ops' tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec

import pytest

from tests.support.interpreter import quicker_interpreter


@pytest.fixture(autouse=True, scope="session")
def interpreter() -> Iterator[None]:
    interpreted = find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
    with quicker_interpreter() if interpreted else nullcontext():
        yield
