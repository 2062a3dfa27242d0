"""What a mask becomes on a device is made once and kept: the next call with the same mask and shape only finds it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """The `limit` values that were asked for last, by key; safe to ask from several threads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._captured: dict[Hashable, Value] = {}
        self._lock = Lock()

    def get(self, key: Hashable, device: torch.device, make: Callable[[], Value]) -> Value:
        """The value of this key, which may be tensors of this device, made now if it is not there.

        Raises:
            RuntimeError: if it has to be made while a CUDA graph is captured.
        """
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        key = (key, device)
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
                if capturing:  # the graph will read these tensors for as long as it lives
                    self._captured[key] = value
                return value
        if capturing:
            raise RuntimeError(
                "a mask's tables are made on the host, which a CUDA graph cannot record: call attention once with this "
                "mask and these shapes before capturing"
            )
        value = make()
        with self._lock:
            self._values[key] = value
            while len(self._values) > self._limit:
                self._values.popitem(last=False)
        return value


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """The numbers as an int32 tensor on the device, without waiting for it."""
    with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward
        host = torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32))
        return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
