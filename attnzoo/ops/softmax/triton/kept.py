"""What a mask becomes on a device is made once and kept: the next call with the same mask and shape only finds it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from threading import Lock
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

Value = TypeVar("Value", bound=Iterable[Any])


class Kept(Generic[Value]):
    """The `limit` values that were asked for last, by key and device; safe to ask from several threads and streams."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._captured: dict[Hashable, _Entry] = {}
        self._lock = Lock()

    def get(self, key: Hashable, device: torch.device, make: Callable[[], Value]) -> Value:
        """The value of this key, a tuple in which tensors of this device may stand, made now if it is not there.

        Raises:
            RuntimeError: if it has to be made while a CUDA graph is captured.
        """
        key = (key, device)
        on_gpu = device.type == "cuda"
        capturing = on_gpu and torch.cuda.is_current_stream_capturing()
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                if capturing:  # the graph reads these tensors for as long as it lives, so they stay
                    self._captured[key] = entry
        if entry is None:
            if capturing:
                raise RuntimeError(
                    "what kernels know of a mask is made on the host, which a CUDA graph cannot record: "
                    "call attention once with this mask and these shapes before the capture"
                )
            return self._make(key, device, make)
        if on_gpu and not capturing and entry.stream != _stream(device):
            entry.share_with(torch.cuda.current_stream(device))
        return entry.value

    def _make(self, key: Hashable, device: torch.device, make: Callable[[], Value]) -> Value:
        # An inference tensor could not be saved for a later backward; the user's default device may be another one.
        with torch.inference_mode(False), torch.device("cpu"):
            value = make()
        entry = _Entry(value)
        if device.type == "cuda":
            entry = _Entry(value, _stream(device), torch.cuda.current_stream(device).record_event())
        with self._lock:
            self._entries[key] = entry
            while len(self._entries) > self._limit:
                self._entries.popitem(last=False)
        return value


class _Entry(NamedTuple):
    """A value, the stream that fills its tensors, and when it has."""

    value: Any
    stream: int = 0
    filled: torch.cuda.Event | None = None

    def share_with(self, stream: torch.cuda.Stream) -> None:
        """Let another stream read the tensors: once they are filled, and before their memory is used again."""
        assert self.filled is not None
        stream.wait_event(self.filled)
        for part in self.value:
            if isinstance(part, Tensor):
                part.record_stream(stream)


def _stream(device: torch.device) -> int:
    """The current stream, as a number: found much faster than as an object."""
    return torch._C._cuda_getCurrentRawStream(torch.cuda.current_device() if device.index is None else device.index)


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """The numbers as an int32 tensor on the device, without waiting for it."""
    host = torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
