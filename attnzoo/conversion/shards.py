"""Reading and writing the safetensors files of a checkpoint folder, a tensor at a time.

The format: 8 bytes with the header's length, the header as JSON (name -> dtype, shape, offsets), the tensors' bytes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from attnzoo.conversion.errors import ConversionError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES, GGUF = (".bin", ".pt", ".pth", ".ckpt"), ".gguf"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Entry:
    """A tensor as a safetensors header describes it; `dtype` is the format's own word, `nbytes` its stored size."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def reshaped(self, shape: tuple[int, ...]) -> "Entry":
        """The same dtype in another shape."""
        return Entry(self.dtype, shape, prod(shape) * self.nbytes // self.numel if self.numel else 0)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name in the folder, what is in it, and the text metadata of its header."""

    name: str
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ConversionError where there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConversionError(f"{path} holds no JSON object")
    return data


def read_shards(folder: Path) -> tuple[list[Shard], dict[str, Any] | None]:
    """The shards of a checkpoint folder, and its index if it has one; reads headers only.

    Raises:
        ConversionError: no safetensors there (pickles and GGUF get the way to convert them), a shard that is missing,
            truncated or broken, or one that does not hold what the index says.
    """
    if (folder / SINGLE).is_file():
        return [_read_shard(folder / SINGLE)], None
    if not (folder / INDEX).is_file():
        raise ConversionError(_no_weights(folder))
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConversionError(f"{folder / INDEX} has no weight_map of tensor names to files")
    shards = []
    for name in sorted(set(weight_map.values())):
        # A name from a file of unknown origin; only files of this folder are read.
        if Path(name).name != name or not (folder / name).is_file():
            raise ConversionError(f"{folder / INDEX} names the file {name!r}, which is not in the folder")
        shards.append(_read_shard(folder / name))
    found = {tensor: shard.name for shard in shards for tensor in shard.entries}
    for tensor, name in weight_map.items():
        if found.get(tensor) != name:
            raise ConversionError(f"tensor {tensor} is missing from {folder / name}, where {INDEX} says it is")
    for tensor, name in found.items():
        if tensor not in weight_map:
            raise ConversionError(f"tensor {tensor} of {folder / name} is missing from {INDEX}")
    return shards, index


def _no_weights(folder: Path) -> str:
    suffixes = {path.suffix for path in folder.iterdir()}
    if suffixes & set(PICKLES):
        return (
            f"{folder} holds its weights as a pickle ({', '.join(sorted(suffixes & set(PICKLES)))}), which can run "
            "code when it is read, so it is not read here; if you trust it, rewrite it once: "
            'AutoModelForCausalLM.from_pretrained(folder).save_pretrained("other-folder", safe_serialization=True)'
        )
    if GGUF in suffixes:
        return gguf_message(folder)
    return f"{folder} holds neither {SINGLE} nor {INDEX}"


def gguf_message(path: Path) -> str:
    """What to do with a GGUF file."""
    return (
        f"{path} is GGUF, not a checkpoint folder; make one first: "
        'AutoModelForCausalLM.from_pretrained(folder, gguf_file="name.gguf").save_pretrained("other-folder"), '
        "and the same with AutoTokenizer"
    )


def _read_shard(path: Path) -> Shard:
    try:
        with safe_open(path, framework="pt"):  # checks the header, and the file's length against it
            pass
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} is truncated or not a safetensors file: {error}") from None
    metadata = header.pop("__metadata__", None) or {}
    entries = {
        name: Entry(item["dtype"], tuple(item["shape"]), item["data_offsets"][1] - item["data_offsets"][0])
        for name, item in header.items()
    }
    return Shard(path.name, entries, metadata)


class ShardWriter:
    """Writes a shard's tensors one by one, in any order, so that none has to wait in memory for the others."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        self._path = folder / shard.name
        self._offsets: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {**shard.metadata, "format": "pt"}}
        end = 0
        # Widest elements first, so that every tensor starts at a multiple of its element size.
        for name, entry in sorted(shard.entries.items(), key=lambda item: -item[1].nbytes / max(item[1].numel, 1)):
            header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (end, end + entry.nbytes)}
            self._offsets[name] = end
            end += entry.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start, self._shard = 8 + len(text), shard
        self._file = self._path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one of the shard's tensors; its shape and dtype are those of its entry."""
        entry, data = self._shard.entries[name], tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        if tuple(tensor.shape) != entry.shape or data.numel() != entry.nbytes:
            raise AssertionError(f"{name}: planned {entry}, came {tensor.dtype} {tuple(tensor.shape)}")
        self._file.seek(self._start + self._offsets.pop(name))
        self._file.write(data.numpy().data)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self._file.close()
        if kind is None and self._offsets:
            raise AssertionError(f"{self._path.name} lacks {', '.join(self._offsets)}")
