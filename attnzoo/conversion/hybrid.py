"""Hybrid models, in which some layers get another mechanism: which ones, by what each costs, and what was paid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from attnzoo.conversion.damage import Damage
from attnzoo.conversion.errors import ConversionError


@dataclass(frozen=True)
class KVBudget:
    """How much of its cache a model may keep.

    Args:
        share: of the bytes that the original's cache takes, in (0, 1].
        length: tokens in the cache for which that holds; a window saves nothing before it is full.
    """

    share: float
    length: int

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share <= 1:
            raise ConversionError(f"share must be a number in (0, 1], got {self.share!r}")
        if isinstance(self.length, bool) or not isinstance(self.length, int) or self.length < 1:
            raise ConversionError(f"length must be a positive integer, got {self.length!r}")


Layers = int | Sequence[int] | KVBudget  # how many, which ones, or as many as the cache's size asks for


@dataclass(frozen=True)
class HybridDamage(Damage):
    """A conversion of some layers.

    alone: KL divergence from the original's next-token distribution when that layer alone is changed, nats a token, on
        calibration text; empty where the layers were given. changed: numbers of the layers that were.
    length: tokens in the cache for which kv_bytes and kv_bytes_before (a token's share there) are given.
    """

    alone: list[float] = field(default_factory=list)
    changed: list[int] = field(default_factory=list)
    length: int = 0


def asked_layers(layers: Layers | None, count: int) -> list[int] | None:
    """The layers that a request names, or None where the damage has to choose.

    Raises:
        ConversionError: for layers that a model with `count` layers does not have.
    """
    if layers is None or layers == count:
        return list(range(count))
    if isinstance(layers, KVBudget):
        return None
    if isinstance(layers, int) and not isinstance(layers, bool):
        if not 0 < layers < count:
            raise ConversionError(f"layers must be from 1 to {count}, as many as the model has; got {layers}")
        return None
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        raise ConversionError(f"layers must be a number, a list of numbers, a KVBudget or None; got {layers!r}")
    chosen = sorted(set(layers))
    if not chosen or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < count for n in chosen):
        raise ConversionError(f"layers must list some of the model's layers 0 to {count - 1}, got {list(layers)}")
    return chosen


def choose_layers(
    alone: Sequence[float], layers: int | KVBudget, before: Sequence[float], after: Sequence[float]
) -> list[int]:
    """The layers that cost the least: so many, or as few as a budget allows.

    Args:
        alone: what changing each layer costs.
        layers: the request.
        before, after: bytes of each layer's cache as it is and when it is changed.

    Raises:
        ConversionError: for a budget that changing all layers does not meet.
    """
    order = sorted(range(len(alone)), key=lambda number: alone[number])
    if isinstance(layers, int):
        return sorted(order[:layers])
    allowed, taken = layers.share * sum(before), sum(before)
    chosen: list[int] = []
    for number in order:
        if taken <= allowed:
            break
        if after[number] < before[number]:
            taken += after[number] - before[number]
            chosen.append(number)
    if taken > allowed:
        raise ConversionError(
            f"share is {layers.share} of the cache of {layers.length} tokens; with all layers changed, "
            f"{taken / sum(before):.3f} of it is left"
        )
    return sorted(chosen)
