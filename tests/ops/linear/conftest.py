"""What the tests of linear attention have in common."""

from __future__ import annotations

import pytest

from attnzoo.ops.linear import chunked


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 tokens, so that short sequences have several."""
    monkeypatch.setattr(chunked, "CHUNK", 8)
