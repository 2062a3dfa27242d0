"""What several runs have in common, made once and kept under a hash of what it was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from recipes.run_folder import write_whole


class Common:
    """Places in `folder`, or, where that is None, those that a run keeps to itself.

    A run that needs what another one is making waits for it.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()

    def place(self, kind: str, identity: Any, *, own: Path) -> Path:
        """Where what `identity` (JSON) describes lies; `own` without a common folder."""
        return own if self.folder is None else self.folder / kind / fingerprint(identity)

    def once(self, path: Path, make: Callable[[], Any]) -> None:
        """Calls `make`, which makes `path` as a whole, unless that is there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.folder is None:
            if not path.exists():
                make()
            return
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                make()

    def value(self, kind: str, identity: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives (JSON), from the folder where it was made before."""
        if self.folder is None:
            return make()
        path = self.place(kind, identity, own=Path()).with_suffix(".json")
        self.once(path, lambda: write_whole(path, json.dumps(make())))
        return json.loads(path.read_text(encoding="utf-8"))


def fingerprint(identity: Any) -> str:
    """A short hash of something that JSON can hold."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def of_model(folder: Path) -> list[Any]:
    """What tells a model's folder from others: its config, and names, sizes and times of its weights."""
    weights = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in folder.glob("*.safetensors")]
    return [(folder / "config.json").read_text(encoding="utf-8"), *sorted(weights)]
