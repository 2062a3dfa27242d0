"""Streaming: documents are read and tokenised while training, and a resume goes on at the very next row.

A stream is divided into lanes, each of which reads its own share of the documents and makes rows of them. The lanes
take turns in giving a row, so the order of all rows depends on their number alone, and the lanes can be shared out
among any number of processes that divides it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recipes import parallel
from recipes.data_corpus import texts
from recipes.data_rows import Pieces, check_identity, permutation
from recipes.data_tokens import encode
from recipes.packed import pack

Position = dict[
    str, Any
]  # of a row: epoch; source, the dataset's state before the row's first document; offset into that


def start_of(epoch: int) -> Position:
    return {"epoch": epoch, "source": None, "offset": 0}


class StreamLoader:
    """Endless batches of rows from a stream; a process reads and tokenises its own lanes only.

    Args:
        open_documents: opens the stream; called once for each lane of this process.
        column: that holds the text.
        keep: which documents train, by their tokens; the others are held out.
        shuffle_rows: rows of a lane that are read ahead and given in shuffled order.
        lanes: of the stream; None: as many as processes. A state knows their number, and a loader that goes on from it
            takes it over.
        rank, world_size: of `world_size` neighbouring rows each process takes one.

    Raises:
        ValueError: when the processes cannot share out the lanes evenly.
    """

    def __init__(
        self,
        open_documents: Callable[[], IterableDataset],
        column: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        keep: Callable[[np.ndarray], bool],
        seq_len: int,
        batch_size: int,
        seed: int,
        shuffle_rows: int,
        data: str,
        lanes: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.identity = {"data": data, "seed": seed, "seq_len": seq_len, "shuffle_rows": shuffle_rows}
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.given = 0  # rows, by all processes
        self._lane = lambda number, count: Lane(
            split_dataset_by_node(open_documents(), number, count) if count > 1 else open_documents(),
            column,
            tokenizer,
            keep=keep,
            seq_len=seq_len,
            seeds=(seed, number),
            shuffle_rows=shuffle_rows,
        )
        self._open_lanes(lanes or world_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows = {number: lane.rows() for number, lane in self.lanes.items()}
        while True:
            mine = range(self.given + self.rank, self.given + self.batch_size * self.world_size, self.world_size)
            pieces = [piece for row in mine for piece in next(rows[row % self.count])]
            self.given += self.batch_size * self.world_size
            yield pack(pieces)

    def state_dict(self) -> dict[str, Any]:
        """The same in all processes; call it in all of them at once."""
        own = {number: lane.state_dict() for number, lane in self.lanes.items()}
        everyone = parallel.gather(own) if self.world_size > 1 else [own]
        states = [state for _, state in sorted((number, state) for one in everyone for number, state in one.items())]
        return {"given": self.given, "lanes": states, **self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a state of other data, seed, row length or shuffling, or of lanes that do not fit."""
        check_identity(self.identity, state)
        self._open_lanes(len(state["lanes"]))
        self.given = state["given"]
        for number, lane in self.lanes.items():
            lane.load_state_dict(state["lanes"][number])

    def _open_lanes(self, count: int) -> None:
        if count % self.world_size:
            raise ValueError(
                f"the stream has {count} lanes, which {self.world_size} processes cannot share out evenly: the number "
                f"of processes must divide {count}. data.lanes sets it for a new run"
            )
        self.count = count
        self.lanes = {number: self._lane(number, count) for number in range(self.rank, count, self.world_size)}


class Lane:
    """Endless rows of one share of a stream, which starts again when it ends.

    `shuffle_rows` rows are read ahead and given in shuffled order; from the second epoch on `datasets` also shuffles
    the order of the files.
    """

    def __init__(
        self,
        documents: IterableDataset,
        column: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        keep: Callable[[np.ndarray], bool],
        seq_len: int,
        seeds: tuple[int, ...],
        shuffle_rows: int,
    ) -> None:
        self.documents = documents
        self.column = column
        self.tokenizer = tokenizer
        self.keep = keep
        self.seq_len = seq_len
        self.seeds = seeds
        self.shuffle_rows = shuffle_rows
        self.block = 0  # how many blocks of shuffle_rows rows were begun before the one that is being given
        self.position = start_of(0)  # of the block's first row
        self.row = 0  # the first one of the block that was not given yet

    def rows(self) -> Iterator[Pieces]:
        """Row after row; the state says which one comes next."""
        for row, after in self._shuffled():
            self.block, self.position, self.row = after
            yield row

    def state_dict(self) -> dict[str, Any]:
        return {"block": self.block, "position": self.position, "row": self.row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.block, self.position, self.row = state["block"], state["position"], state["row"]

    def _shuffled(self) -> Iterator[tuple[Pieces, tuple[int, Position, int]]]:
        """Rows, each with the block, position and row that come after it."""
        block, position, given = self.block, self.position, self.row
        for ahead in self._blocks(position):
            order = permutation(len(ahead), *self.seeds, block)
            for count, index in enumerate(order[given:].tolist(), start=given + 1):
                yield ahead[index][0], (block, position, count)
            block, position, given = block + 1, ahead[-1][1], 0

    def _blocks(self, position: Position) -> Iterator[list[tuple[Pieces, Position]]]:
        """Up to shuffle_rows rows at a time, all of one epoch, each with the position after it."""
        while True:
            epoch, anything = position["epoch"], position != start_of(position["epoch"])
            rows = self._rows_of_epoch(position)
            while ahead := list(islice(rows, self.shuffle_rows)):
                anything = True
                yield ahead
            if not anything:
                raise ValueError(
                    "the stream of training documents is empty: it has no text, or all of it is held out, or fewer "
                    "documents than the run has processes (data.lanes)"
                )
            position = start_of(epoch + 1)

    def _rows_of_epoch(self, position: Position) -> Iterator[tuple[Pieces, Position]]:
        epoch, offset = position["epoch"], position["offset"]
        pieces: Pieces = []
        filled = 0
        for ids, source in self._documents(epoch, position["source"]):
            while offset < len(ids):
                piece = ids[offset : offset + self.seq_len - filled]
                pieces.append(piece)
                offset += len(piece)
                filled += len(piece)
                if filled == self.seq_len:
                    yield pieces, {"epoch": epoch, "source": source, "offset": offset}
                    pieces, filled = [], 0
            offset = 0
        if pieces:
            yield pieces, start_of(epoch + 1)

    def _documents(
        self, epoch: int, source: dict[str, Any] | None
    ) -> Iterator[tuple[np.ndarray, dict[str, Any] | None]]:
        """Tokens of the documents that train, each with the state of the dataset before it."""
        self.documents.set_epoch(epoch)
        self.documents.load_state_dict(source)
        for ids in encode(texts(self.documents, self.column), self.tokenizer, at_once=1):
            if len(ids) and self.keep(ids):
                yield ids, source
            source = self.documents.state_dict()
