"""Streaming: documents are read and tokenised while training, and a resume goes on at the very next row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from datasets import IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

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
    """Endless batches of rows from a stream that starts again when it ends.

    `shuffle_rows` rows are read ahead and given in shuffled order; from the second epoch on `datasets` also shuffles
    the order of the files. Every rank reads the whole stream and keeps its share of the rows, so that a state fits
    every rank.

    Args:
        documents: the stream.
        keep: which documents train, by their tokens; the others are held out.
    """

    def __init__(
        self,
        documents: IterableDataset,
        column: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        keep: Callable[[np.ndarray], bool],
        seq_len: int,
        batch_size: int,
        seed: int,
        shuffle_rows: int,
        data: str,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.documents = documents
        self.column = column
        self.tokenizer = tokenizer
        self.keep = keep
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle_rows = shuffle_rows
        self.rank = rank
        self.world_size = world_size
        self.identity = {"data": data, "seed": seed, "seq_len": seq_len, "shuffle_rows": shuffle_rows}
        self.block = 0  # how many blocks of shuffle_rows rows were begun before the one that is being given
        self.position = start_of(0)  # of the block's first row
        self.row = 0  # the first one of the block that was not given yet

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows = self._shuffled()
        while True:
            together = list(islice(rows, self.batch_size * self.world_size))
            self.block, self.position, self.row = together[-1][1]
            yield pack([piece for row, _ in together[self.rank :: self.world_size] for piece in row])

    def state_dict(self) -> dict[str, Any]:
        return {"block": self.block, "position": self.position, "row": self.row, **self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the state is of other data, another seed, row length or shuffling."""
        check_identity(self.identity, state)
        self.block, self.position, self.row = state["block"], state["position"], state["row"]

    def _shuffled(self) -> Iterator[tuple[Pieces, tuple[int, Position, int]]]:
        """Rows, each with the block, position and row that come after it."""
        block, position, given = self.block, self.position, self.row
        for ahead in self._blocks(position):
            order = permutation(len(ahead), self.seed, block)
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
                raise ValueError("the stream of training documents is empty: it has no text, or all of it is held out")
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
