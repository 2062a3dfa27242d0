"""Counts of parameters: what is stored, and what a token is multiplied with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters of a part of a model; they add.

    Attributes:
        total: all that are stored.
        matmul: of the matrices that one token is multiplied with; of routed experts, those that it is sent to.
        routed: of `total`, those in routed experts.
        chosen: of `routed`, those in the experts that one token is sent to.
    """

    total: int = 0
    matmul: int = 0
    routed: int = 0
    chosen: int = 0

    def __add__(self, other: Weights) -> Weights:
        return Weights(
            self.total + other.total,
            self.matmul + other.matmul,
            self.routed + other.routed,
            self.chosen + other.chosen,
        )

    @property
    def active(self) -> int:
        """All but the routed experts that a token is not sent to."""
        return self.total - self.routed + self.chosen

    def read(self, batch: int) -> float:
        """How many are read in one step of `batch` tokens, in the mean, if the router has no favourites.

        Of each expert the chance that no token is sent to it is `(1 - chosen / routed) ** batch`.
        """
        if not self.routed:
            return self.total
        return self.total - self.routed * (1 - self.chosen / self.routed) ** batch


def matrix(columns: int, rows: int, *, bias: bool = False) -> Weights:
    """A linear layer from `columns` to `rows` numbers."""
    return Weights(columns * rows + bias * rows, columns * rows)


def vectors(count: int) -> Weights:
    """`count` parameters that nothing is multiplied with as a matrix: norms, biases, sinks."""
    return Weights(count)


def feed_forward(dim: int, hidden: int, *, gated: bool, bias: bool = False) -> Weights:
    """An MLP: up and down, and a gate beside up if `gated`."""
    up = matrix(dim, hidden, bias=bias)
    return (up + up if gated else up) + matrix(hidden, dim, bias=bias)


def experts(one: Weights, count: int, chosen: int) -> Weights:
    """`count` routed experts like `one`, of which a token is sent to `chosen`."""
    return Weights(count * one.total, chosen * one.matmul, count * one.total, chosen * one.total)
