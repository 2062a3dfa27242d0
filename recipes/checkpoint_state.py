"""What a checkpoint holds, as JSON and tensors: plain values, and where each tensor or part of one lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


class Stored(NamedTuple):
    """A tensor in the files of a checkpoint, read when it is asked for."""

    files: tuple[Any, ...]  # open ones, that hold it: one, or its parts in order
    name: str
    dim: int  # along which the parts lie

    def whole(self) -> Tensor:
        parts = [file.get_tensor(self.name) for file in self.files]
        return parts[0].clone() if len(parts) == 1 else torch.cat(parts, self.dim)  # no view of the file

    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        shapes = [file.get_slice(self.name).get_shape() for file in self.files]
        whole = list(shapes[0])
        if len(shapes) > 1:
            whole[self.dim] = sum(shape[self.dim] for shape in shapes)
        return tuple(whole)

    def part(self, dim: int, start: int, stop: int) -> Tensor:
        """`[start:stop]` along `dim`; of parts that lie along it only those that it takes."""
        if dim != self.dim and len(self.files) > 1:
            return self.whole().narrow(dim, start, stop - start)
        found, begin = [], 0
        for file in self.files:
            stored = file.get_slice(self.name)
            end = begin + stored.get_shape()[dim]
            first, last = max(start, begin), min(stop, end)
            if first < last:
                found.append(stored[(slice(None),) * dim + (slice(first - begin, last - begin),)])
            begin = end
        if not found:  # a process has no share of a tensor with fewer rows than there are processes
            return self.files[0].get_tensor(self.name).narrow(dim, 0, 0)
        return found[0].clone() if len(found) == 1 else torch.cat(found, dim)


def pack_state(value: Any, path: str, tensors: dict[str, Tensor], names: dict[Any, str], rank: int) -> Any:
    """`value` as JSON; its tensors go to `tensors`, each storage once, under the path that leads to it."""
    if isinstance(value, Tensor):
        dim = _sharded_dim(value)
        local = value.to_local() if isinstance(value, DTensor) else value
        key = (local.data_ptr(), local.dtype, local.shape, local.stride()) if local.numel() else path
        if key not in names:
            names[key] = path
            if rank == 0 or dim is not None:  # what is whole is the same everywhere
                tensors[path] = local.detach().contiguous().cpu()
        return {"tensor": names[key], "dim": dim}
    if isinstance(value, Mapping):
        return {"items": [[k, pack_state(v, f"{path}/{k}", tensors, names, rank)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        packed = [pack_state(v, f"{path}/{i}", tensors, names, rank) for i, v in enumerate(value)]
        return packed if isinstance(value, list) else {"tuple": packed}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"a checkpoint cannot hold the {type(value).__name__} at {path}")


def unpack_state(value: Any, files: tuple[Any, ...]) -> Any:
    if isinstance(value, list):
        return [unpack_state(v, files) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        whole = value["dim"] is None
        return Stored(files[:1] if whole else files, value["tensor"], 0 if whole else value["dim"])
    if "tuple" in value:
        return tuple(unpack_state(v, files) for v in value["tuple"])
    return {k: unpack_state(v, files) for k, v in value["items"]}


def load_whole(value: Any) -> Any:
    """The same with every tensor read."""
    return over_tensors(value, Stored.whole)


def over_tensors(value: Any, function: Callable[[Stored], Any]) -> Any:
    if isinstance(value, Stored):
        return function(value)
    if isinstance(value, dict):
        return {k: over_tensors(v, function) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(over_tensors(v, function) for v in value)
    return value


def _sharded_dim(tensor: Tensor) -> int | None:
    """The dimension along which the processes hold parts of it; None for a tensor that each of them holds whole."""
    if not isinstance(tensor, DTensor):
        return None
    dims = [placement.dim for placement in tensor.placements if isinstance(placement, Shard)]
    if len(dims) > 1 or any(placement.is_partial() for placement in tensor.placements):
        raise TypeError(f"a checkpoint cannot hold a tensor that is placed as {tensor.placements}")
    return dims[0] if dims else None
