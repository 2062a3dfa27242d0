"""Counters by which the programs of one call learn that they are the last; they are never set back.

Each call adds the number of its splits, so a counter serves calls of one number of splits, one after another: those of
one stream, or one place in a captured graph. No Triton here.
"""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

_LEAST = 1024  # counters of a stream; more than a call that splits rows has programs on most GPUs
_POOL = 2**17  # counters for captured calls that are made at a time: 1 MiB

_lock = Lock()
_of_streams: dict[tuple[torch.device, int, int], Tensor] = {}
_pools: dict[torch.device, Tensor] = {}  # the rest of each device's
_kept: list[Tensor] = []  # graphs hold addresses, no references


def counters(device: torch.device, count: int, splits: int) -> Tensor:
    """At least `count` counters for a call on the current stream whose rows are cut into `splits`."""
    cuda = device.type == "cuda"
    if cuda and torch.cuda.is_current_stream_capturing():
        return _for_a_graph(device, count)
    stream = torch._C._cuda_getCurrentRawStream(device.index) if cuda else 0
    found = _of_streams.get((device, stream, splits))
    if found is None or found.numel() < count:
        with _lock:
            found = torch.zeros(max(count, _LEAST), dtype=torch.int64, device=device)
            _of_streams[device, stream, splits] = found
            if cuda and (device not in _pools or _pools[device].numel() < _POOL // 8):
                _pools[device] = torch.zeros(_POOL, dtype=torch.int64, device=device)
                _kept.append(_pools[device])
                torch.cuda.synchronize(device)  # whatever stream a graph is replayed on finds zeros
    return found


def _for_a_graph(device: torch.device, count: int) -> Tensor:
    """Counters that no other call has. Zeros are made in the graph, at every replay, only where no call came before."""
    count += count % 2  # 16 bytes: kernels are compiled for addresses that are multiples of it
    with _lock:
        pool = _pools.get(device)
        if pool is None or pool.numel() < count:
            return torch.zeros(count, dtype=torch.int64, device=device)
        _pools[device] = pool[count:]
        return pool[:count]
