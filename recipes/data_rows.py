"""Rows of packed documents, and the loaders that shuffle, share out and resume them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.packed import pack

Pieces = list[np.ndarray]  # the documents' parts that make a row


class Rows:
    """Documents laid end to end and cut every `seq_len` tokens; row r is the r-th cut, the last one may be shorter.

    Args:
        ids: the tokens of all documents, 1-D.
        starts, lengths: where in `ids` each document lies, in the order in which they are laid.
        seq_len: tokens of a row.
    """

    def __init__(self, ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, seq_len: int) -> None:
        self.ids = ids
        self.starts = starts
        self.ends = np.cumsum(lengths)  # of the documents, as laid
        self.begins = self.ends - lengths
        self.seq_len = seq_len
        self.tokens = int(lengths.sum())

    def __len__(self) -> int:
        return -(-self.tokens // self.seq_len)

    def __getitem__(self, row: int) -> Pieces:
        first, last = row * self.seq_len, min((row + 1) * self.seq_len, self.tokens)
        pieces = []
        document = int(np.searchsorted(self.ends, first, side="right"))
        while first < last:
            end = min(last, int(self.ends[document]))
            offset = int(self.starts[document] - self.begins[document])
            pieces.append(np.asarray(self.ids[first + offset : end + offset]))
            first, document = end, document + 1
        return pieces


class RowLoader:
    """Batches of rows in order: the held-out text. Every rank gets as many batches, the last one maybe without text.

    Args:
        rows: anything that gives a row's pieces by its index.
        batch_size: rows of a batch.
        rank, world_size: of `world_size` neighbouring rows each rank takes one.
    """

    def __init__(self, rows: Sequence[Pieces] | Rows, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return -(-len(self.rows) // self._rows_of_all_ranks)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for first in range(0, len(self.rows), self._rows_of_all_ranks):
            yield self._batch(np.arange(first, min(first + self._rows_of_all_ranks, len(self.rows))))

    @property
    def _rows_of_all_ranks(self) -> int:
        return self.batch_size * self.world_size

    def _batch(self, together: np.ndarray) -> dict[str, Tensor]:
        mine = together[self.rank :: self.world_size]
        return pack([piece for row in mine.tolist() for piece in self.rows[row]])


class TrainLoader(RowLoader):
    """Batches of rows in an order of their own in each epoch, by seed and epoch alone.

    Iterating goes on where the last iteration stopped, to the end of the epoch; after it comes the next epoch.
    `state_dict()` says which batch comes next, whoever asks and on whatever rank.
    """

    def __init__(
        self, rows: Rows, batch_size: int, *, seed: int, data: str, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(rows, batch_size, rank=rank, world_size=world_size)
        self.seed = seed
        self.identity = {"data": data, "seed": seed, "seq_len": rows.seq_len}
        self.epoch = 0
        self.row = 0  # the first one of this epoch that was not given yet

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = epoch_order(len(self.rows), self.seed, self.epoch)
        for first in range(self.row, len(order), self._rows_of_all_ranks):
            together = order[first : first + self._rows_of_all_ranks]
            self.row = first + len(together)
            if self.row == len(order):  # before the batch is given: a checkpoint may follow and no further call
                self.epoch, self.row = self.epoch + 1, 0
            yield self._batch(together)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "row": self.row, **self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the state is of other data, another seed or another row length."""
        check_identity(self.identity, state)
        self.epoch, self.row = state["epoch"], state["row"]


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0 ... count - 1 with the last row, which may be shorter than the others, at its end."""
    full = max(count - 1, 0)
    return np.append(permutation(full, seed, epoch), np.arange(full, count))


def permutation(count: int, *seeds: int) -> np.ndarray:
    """The order of 0 ... count - 1 that belongs to these seeds, the same on every machine."""
    seed = np.random.SeedSequence([number % 2**32 for number in seeds]).generate_state(1, np.uint64)[0]
    return torch.randperm(count, generator=torch.Generator().manual_seed(int(seed >> np.uint64(1)))).numpy()


def check_identity(expected: dict[str, Any], state: dict[str, Any]) -> None:
    """Raises ValueError that lists what differs between a loader and the state that it is to continue from."""
    different = [
        f"{key}: {state.get(key)!r} then, {now!r} now" for key, now in expected.items() if state.get(key) != now
    ]
    if different:
        raise ValueError(f"cannot continue in the training data, which has changed ({'; '.join(different)})")
