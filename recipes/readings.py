"""A step's numbers on their way from the device to the host, which is not to wait for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.packed import Batch


@dataclass(frozen=True)
class Reading:
    """Numbers of an optimizer step (from 1) by name, its learning rate, and the micro-batches that it was made of."""

    step: int
    numbers: dict[str, float]
    rate: float
    window: Sequence[Batch]


class Readings:
    """A queue: `put` never waits for the device, `take` waits for what it gives."""

    def __init__(self) -> None:
        self._queue: deque[tuple[torch.cuda.Event | None, Tensor, Sequence[str], int, float, Sequence[Batch]]] = deque()

    def put(self, step: int, names: Sequence[str], values: Tensor, rate: float, window: Sequence[Batch]) -> None:
        """`values`, one of each name, are on their way from now on."""
        event = None
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)  # into pinned memory
            event = torch.cuda.Event()
            event.record()
        self._queue.append((event, values, names, step, rate, window))

    def take(self, *, but: int = 0) -> Iterator[Reading]:
        """All readings in order, but the last few."""
        while len(self._queue) > but:
            event, values, names, step, rate, window = self._queue.popleft()
            if event is not None:
                event.synchronize()
            yield Reading(step, dict(zip(names, values.tolist(), strict=True)), rate, window)
