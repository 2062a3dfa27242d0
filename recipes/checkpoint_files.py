"""A checkpoint on disk: safetensors and JSON in a folder that appears whole or not at all, and nothing to unpickle.

    state.json                              all but the tensors, and where each of them lies
    tensors.safetensors                     written by one process, or
    tensors_00001_of_00004.safetensors      one a process, with its part of every sharded tensor
    manifest.json                           size and sha256 of the other files

Every file is read back and compared before the folder gets its name. A sharded tensor is stored in parts along one
dimension, so any number of processes can read the parts that they need.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from attnzoo.conversion.folders import to_disk
from recipes.checkpoint_state import pack_state, unpack_state

STATE, MANIFEST = "state.json", "manifest.json"

T = TypeVar("T")


class NotWritten(OSError):
    """A checkpoint could not be written, or was not what it should be when it was read back."""


class Broken(ValueError):
    """A checkpoint on disk is not what was written."""


class Processes(Protocol):
    """Those that write a checkpoint together."""

    rank: int
    size: int

    def gather(self, value: T) -> list[T]: ...


class Alone:
    rank, size = 0, 1

    def gather(self, value: T) -> list[T]:
        return [value]


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path, processes: Processes | None = None) -> None:
    """Writes `checkpoint`, read back and compared, to the folder `path`; call it in all of `processes`.

    Args:
        checkpoint: dictionaries, lists, numbers, strings and tensors; DTensors are sharded along at most one dimension,
            and every process writes its own part.
        path: of the folder, which must not exist.
        processes: that write together; None: this one alone.

    Raises:
        NotWritten: in all of the processes, when one of them could not write or read back; no folder is left then.
        TypeError: for what a checkpoint cannot hold.
    """
    processes = processes or Alone()
    partial = path.with_name(f".{path.name}.partial")
    tensors: dict[str, Tensor] = {}
    try:
        in_all(processes, lambda: _make_empty(partial) if processes.rank == 0 else None)
        state = pack_state(checkpoint, "", tensors, {}, processes.rank)
        name = tensor_file(processes.rank, processes.size)
        records = in_all(processes, lambda: _write_tensors(tensors, partial / name))
        files = {tensor_file(rank, processes.size): record for rank, record in enumerate(records)}
        in_all(processes, lambda: _finish(partial, path, state, files) if processes.rank == 0 else None)
    finally:
        if processes.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


def read_checkpoint(path: Path, processes: Processes | None = None) -> dict[str, Any]:
    """The checkpoint in `path`, each tensor in it a `Stored`; the files are compared with the manifest first.

    Raises:
        Broken: for a file that is missing or not what was written.
    """
    processes = processes or Alone()
    problems = [problem for found in processes.gather(_problems(path, processes)) for problem in found]
    if problems:
        raise Broken(f"the checkpoint {path} is damaged: {'; '.join(problems)}")
    files = tuple(safe_open(file, "pt") for file in sorted(path.glob("tensors*.safetensors")))
    return unpack_state(json.loads((path / STATE).read_text(encoding="utf-8")), files)


def in_all(processes: Processes, work: Callable[[], T]) -> list[T]:
    """What `work()` gave in each process; raises NotWritten in all of them when it failed in one."""
    mine: T | None = None
    failure: Exception | None = None
    try:
        mine = work()
    except (OSError, SafetensorError) as error:
        failure = error
    outcomes = processes.gather((mine, None if failure is None else str(failure)))
    for rank, (_, message) in enumerate(outcomes):
        if message is not None:
            raise NotWritten(message if processes.size == 1 else f"process {rank}: {message}") from failure
    return [value for value, _ in outcomes]  # type: ignore[misc]


def tensor_file(rank: int, size: int) -> str:
    return "tensors.safetensors" if size == 1 else f"tensors_{rank:05d}_of_{size:05d}.safetensors"


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_tensors(tensors: dict[str, Tensor], file: Path) -> dict[str, Any]:
    """Writes and reads back; the file's line in the manifest."""
    save_file(tensors, file)
    to_disk(file)
    _forget(file)
    with safe_open(file, "pt") as stored:
        if set(stored.keys()) != set(tensors):
            raise NotWritten(f"{file.name} holds other tensors than were written")
        for name, tensor in tensors.items():
            if not _same_bits(stored.get_tensor(name), tensor):
                raise NotWritten(f"{file.name}: {name} came back from the disk changed")
    return _record(file)


def _finish(partial: Path, path: Path, state: Any, files: dict[str, dict[str, Any]]) -> None:
    text = json.dumps(state)
    (partial / STATE).write_text(text, encoding="utf-8")
    to_disk(partial / STATE)
    _forget(partial / STATE)
    if (partial / STATE).read_text(encoding="utf-8") != text:
        raise NotWritten(f"{STATE} came back from the disk changed")
    manifest = {"files": files | {STATE: _record(partial / STATE)}}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for place in (partial / MANIFEST, partial):
        to_disk(place)
    partial.rename(path)
    to_disk(path.parent)


def _problems(path: Path, processes: Processes) -> list[str]:
    """What this process's share of the files lacks."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        return [f"{MANIFEST} cannot be read ({error})"] if processes.rank == 0 else []
    found = []
    for name in sorted(files)[processes.rank :: processes.size]:
        if not (path / name).is_file():
            found.append(f"{name} is missing")
        elif _record(path / name) != files[name]:
            found.append(f"{name} is not what was written (its sha256 differs)")
    return found


def _record(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _forget(file: Path) -> None:
    """Drops the file from the system's cache, so that what is read next comes from the disk."""
    if hasattr(os, "posix_fadvise"):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """NaN is equal to itself here."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(one, other)
