"""A teacher's most probable next tokens on disk, so that training needs no teacher beside the student.

They are stored by pieces of documents, under a hash of the tokens: so they fit any order of the rows, any number of
ranks, and every run that reads the same text in rows of the same length.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from recipes.heads import head_of
from recipes.packed import Batch, hidden_packed
from recipes.run_folder import write_whole
from recipes.teacher import Teacher

IDENTITY = "identity.json"
SHARD_TOKENS = 1 << 18
CHUNK_TOKENS = 1024  # whose logits are held in fp32 at once
BYTES = 4 + 4  # of a stored token's id and log probability


class TeacherStore:
    """Ids int32 and log probabilities fp32 `[tokens, k]` of pieces, in shards that appear whole or not at all.

    Args:
        folder: of the shards.
        identity: what the numbers depend on beside the text (JSON).

    Raises ValueError where the folder holds those of something else.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, dict(identity)
        file = folder / IDENTITY
        if file.is_file():
            _require_same(folder, json.loads(file.read_text(encoding="utf-8")), self.identity)
        self._places: dict[bytes, tuple[Path, int, int]] = {}
        self._open: dict[Path, Any] = {}
        self._shards: set[Path] = set()
        self.refresh()

    def refresh(self) -> None:
        """Look for shards that others have written."""
        for shard in sorted(set(self.folder.glob("*.safetensors")) - self._shards):
            self._index(shard)

    def __contains__(self, piece: bytes) -> bool:
        return piece in self._places

    def __len__(self) -> int:
        return len(self._places)

    def attach(self, batch: Batch) -> dict[str, Tensor]:
        """The batch with `teacher_ids` and `teacher_logprobs` `[T, k]`; as it is, where a piece is not stored."""
        found = [self._places.get(key) for key in keys_of(batch)]
        if not all(found):
            return dict(batch)
        read = [self._read(*place) for place in found]  # type: ignore[misc]
        ids, logprobs = (torch.cat(tensors) for tensors in zip(*read, strict=True))
        return {**batch, "teacher_ids": ids, "teacher_logprobs": logprobs}

    def add(self, pieces: Mapping[bytes, tuple[Tensor, Tensor]]) -> None:
        """Write a shard of pieces' ids and log probabilities."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / IDENTITY, json.dumps(self.identity, indent=2))
        keys, tensors = list(pieces), list(pieces.values())
        lengths = torch.tensor([len(ids) for ids, _ in tensors])
        path = self.folder / f"{keys[0].hex()}.safetensors"
        partial = path.with_suffix(".partial")
        save_file(
            {
                "keys": torch.tensor([list(key) for key in keys], dtype=torch.uint8),
                "ends": lengths.cumsum(0),
                "ids": torch.cat([ids for ids, _ in tensors]),
                "logprobs": torch.cat([logprobs for _, logprobs in tensors]),
            },
            partial,
        )
        partial.replace(path)
        self._index(path)

    def _index(self, shard: Path) -> None:
        self._shards.add(shard)
        with safe_open(shard, framework="pt") as file:
            keys, ends = file.get_tensor("keys"), file.get_tensor("ends").tolist()
        for key, (start, end) in zip(keys.numpy(), pairwise([0, *ends]), strict=True):
            self._places[key.tobytes()] = (shard, start, end)

    def _read(self, shard: Path, start: int, end: int) -> tuple[Tensor, Tensor]:
        if shard not in self._open:
            self._open[shard] = safe_open(shard, framework="pt")
        file = self._open[shard]
        return file.get_slice("ids")[start:end], file.get_slice("logprobs")[start:end]


class TaughtData:
    """The training batches of `data` with what the store holds of them."""

    def __init__(self, data: Any, store: TeacherStore) -> None:
        self.data, self.store = data, store

    def train_loader(self, *, rank: int = 0, world_size: int = 1) -> TaughtLoader:
        return TaughtLoader(self.data.train_loader(rank=rank, world_size=world_size), self.store)


class TaughtLoader:
    """A stateful loader's batches with what the store holds of them."""

    def __init__(self, loader: Any, store: TeacherStore) -> None:
        self.loader, self.store = loader, store

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.loader:
            yield self.store.attach(batch)

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)


def fill(store: TeacherStore, teacher: Teacher, batches: Iterable[Batch], *, k: int, temperature: float) -> None:
    """Store what is missing of the batches; what a killed call has written is not computed again.

    Args:
        store: to write to.
        teacher: on the device that it is to run on.
        batches: packed, on the CPU.
        k, temperature: see `recipes.objectives.TopKL`.
    """
    waiting: dict[bytes, tuple[Tensor, Tensor]] = {}
    held = 0
    for batch in batches:
        keys = keys_of(batch)
        if all(key in store or key in waiting for key in keys):
            continue
        ids, logprobs = most_probable(teacher, batch, k=k, temperature=temperature)
        for key, (start, end) in zip(keys, pairwise(batch["cu_seqlens"].tolist()), strict=True):
            if key not in store and key not in waiting:
                waiting[key] = ids[start:end], logprobs[start:end]
                held += end - start
        if held >= SHARD_TOKENS:
            store.add(waiting)
            waiting, held = {}, 0
    if waiting:
        store.add(waiting)


@torch.no_grad()
def most_probable(teacher: Teacher, batch: Batch, *, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Ids int32 and log probabilities fp32 `[T, k]` of the tokens that the teacher holds most likely, on the CPU."""
    model = teacher.model
    with torch.autocast(model.device.type, enabled=False):
        hidden = hidden_packed(model, {key: value.to(model.device) for key, value in batch.items()})
        weight, bias, softcap, scale = head_of(model)
        ids, logprobs = [], []
        for piece in hidden.split(CHUNK_TOKENS):
            logits = scale * torch.nn.functional.linear(piece, weight, bias).float()
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            top = (logits / temperature).log_softmax(-1).topk(k)
            ids.append(top.indices.int().cpu())
            logprobs.append(top.values.cpu())
    return torch.cat(ids), torch.cat(logprobs)


def keys_of(batch: Batch) -> list[bytes]:
    """A hash of each piece of a packed batch on the CPU."""
    ids = batch["input_ids"][0].to(torch.int32).numpy()
    return [
        hashlib.blake2b(ids[start:end].tobytes(), digest_size=16).digest()
        for start, end in pairwise(batch["cu_seqlens"].tolist())
    ]


def require_space(folder: Path, *, tokens: int, k: int) -> None:
    """OSError where the disk of `folder` has no room for so many tokens."""
    folder = folder.absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    needed, free = tokens * k * BYTES, shutil.disk_usage(there).free
    if needed > free:
        raise OSError(
            f"{folder} needs {needed / 1e9:.1f} GB for {tokens} tokens with k={k}, and {free / 1e9:.1f} GB are free; "
            "lower objective.kl_topk.k, or name another disk in teacher.cache"
        )


def _require_same(folder: Path, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    different = [
        f"{key}: {there.get(key)!r} there, {value!r} now" for key, value in now.items() if there.get(key) != value
    ]
    if different:
        raise ValueError(
            f"teacher.cache is {folder}, which holds what another teacher or objective gave ({'; '.join(different)}); "
            "name another folder, or delete it"
        )
