"""Layers that are converted already, kept beside the output until it is whole, so that a killed conversion goes on."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class KeptLayers:
    """One file a layer in the folder `.NAME.layers` beside the output NAME.

    Args:
        out: where the output will be.
        key: what the layers depend on; layers that were kept under another key are thrown away.
    """

    def __init__(self, out: Path, key: str) -> None:
        self.folder = out.with_name(f".{out.name}.layers")
        name = self.folder / "key.json"
        if not name.is_file() or json.loads(name.read_text(encoding="utf-8")) != key:
            self.remove()
            self.folder.mkdir(parents=True)
            name.write_text(json.dumps(key), encoding="utf-8")

    def get(self, number: int) -> dict[str, Tensor] | None:
        """A layer's tensors by full name, or None where it is not there yet."""
        try:
            with safe_open(self._path(number), framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (FileNotFoundError, SafetensorError):
            return None

    def layer(self, number: int) -> dict[str, Tensor]:
        """A layer's tensors; raises KeyError where it is not there."""
        found = self.get(number)
        if found is None:
            raise KeyError(number)
        return found

    def put(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a layer: it is there whole or not at all."""
        partial = self.folder / f"{number}.partial"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
        os.replace(partial, self._path(number))

    def remove(self) -> None:
        """Throw all layers away."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"layer-{number:05}.safetensors"
