"""Several sources of text in one stream of batches, each with its share of the rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from recipes.data_rows import Pieces, check_identity
from recipes.packed import Batch, pack


class OneRowLoader(Protocol):
    """Batches of one row each; iterating again goes on with the next epoch, `state_dict` says with which row."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class MixLoader:
    """Endless batches whose rows come from several loaders in fixed proportions.

    After any number of rows each domain has given its weight's share of them, less or more by at most one row or so:
    the next row is of the domain that is furthest behind. A domain that ends starts its next epoch. Every rank reads
    all rows and keeps its share, so that a state fits any number of ranks.

    Args:
        domains: by name, loaders that give one row a batch.
        weights: the share of each domain in the rows; any positive numbers.
        batch_size: rows of a batch.
        rank, world_size: of `world_size` neighbouring rows each rank takes one.
    """

    def __init__(
        self,
        domains: Mapping[str, OneRowLoader],
        weights: Mapping[str, float],
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        total = sum(weights.values())
        self.domains = dict(domains)
        self.weights = {name: weights[name] / total for name in domains}
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.given = dict.fromkeys(self.domains, 0)  # rows of each domain so far

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows = {name: _endless(name, loader) for name, loader in self.domains.items()}
        while True:
            together = [next(rows[self._next_domain()]) for _ in range(self.batch_size * self.world_size)]
            yield pack([piece for row in together[self.rank :: self.world_size] for piece in row])

    def state_dict(self) -> dict[str, Any]:
        states = {name: loader.state_dict() for name, loader in self.domains.items()}
        return {"given": dict(self.given), "domains": states, "weights": dict(self.weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the state is of other domains, weights, data, seeds or row lengths."""
        check_identity({"weights": self.weights}, state)
        self.given = dict(state["given"])
        for name, loader in self.domains.items():
            loader.load_state_dict(state["domains"][name])

    def _next_domain(self) -> str:
        number = sum(self.given.values()) + 1
        name = max(self.domains, key=lambda name: self.weights[name] * number - self.given[name])
        self.given[name] += 1
        return name


def _endless(name: str, loader: OneRowLoader) -> Iterator[Pieces]:
    while True:
        anything = False
        for batch in loader:
            anything = True
            yield _pieces(batch)
        if not anything:
            raise ValueError(f"data.domains.{name} has no text to train on")


def _pieces(batch: Batch) -> list[np.ndarray]:
    ids = batch["input_ids"][0].numpy()
    return [ids[start:end] for start, end in pairwise(batch["cu_seqlens"].tolist())]
