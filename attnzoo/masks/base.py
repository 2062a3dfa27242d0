"""What a mask is: a rule that says which query sees which key, by position.

Positions are absolute, counted along the keys. With `q_len` queries and `k_len` keys the queries are the last ones
(bottom-right alignment), so query row r stands at position `r + k_len - q_len`:

    Causal, q_len 2, k_len 5        Causal, q_len 5, k_len 2
        1 1 1 1 0                       0 0
        1 1 1 1 1                       0 0
                                        0 0
                                        1 0
                                        1 1

A mask may differ from head to head (`PerHead`); its heads then stand in the third dimension from the end.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path


class Tile(IntEnum):
    """What a block map says of one tile of the score matrix."""

    EMPTY = 0
    PARTIAL = 1
    FULL = 2


class Span(NamedTuple):
    """The positions on one side of each tile: `lo, lo + step, ..., hi`, as integer tensors; step 0 where lo == hi."""

    lo: Tensor
    hi: Tensor
    step: Tensor


@dataclass(frozen=True)
class Mask:
    """Base of all patterns: two rules, one by element and one by tile, give everything else.

    Masks are frozen dataclasses of plain values, so they hash, compare and hold no device state. `a & b` sees what both
    see, `a | b` what either sees.
    """

    pattern: ClassVar[str]
    text: ClassVar[str]  # `to_dict` as JSON, to pass through a custom operator's schema; set on the instance
    patterns: ClassVar[dict[str, type[Mask]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "pattern" in cls.__dict__:  # or it is a base of patterns
            Mask.patterns[cls.pattern] = cls

    def __post_init__(self) -> None:
        # Written out now, while the fields are plain numbers: under torch.compile they may be symbols later.
        object.__setattr__(self, "text", _json(self.to_dict()))

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether the query at position `i` sees the key at position `j`.

        Args:
            i, j: integer tensors of absolute positions, broadcast against one another.

        Returns:
            bool tensor of the broadcast shape.
        """
        raise NotImplementedError

    def tiles(self, i: Span, j: Span) -> tuple[Tensor, Tensor]:
        """Whether anything, and whether everything, is visible in tiles of the score matrix, without looking inside.

        Args:
            i, j: positions of each tile's queries and keys, broadcast against one another.

        Returns:
            (anything, everything), bool. `anything` may be true of an empty tile and `everything` false of a full
            one, never the other way round: a kernel that trusts them can lose time, not correctness.
        """
        raise NotImplementedError

    def cut(self, positions: range) -> list[range]:
        """The positions in an order, and cut into pieces, in which tiles of this mask are dense.

        A backend that takes tiles of any positions, not only of neighbours, computes less by it.

        Returns:
            ranges, with steps perhaps, that hold each of `positions` once.
        """
        return [positions]

    @property
    def causal(self) -> bool:
        """True if it is sure that no query sees a later key."""
        return False

    @property
    def heads(self) -> int | None:
        """How many query heads the mask is made for; None: any, and all alike."""
        return None

    def head(self, number: int) -> Mask:
        """The mask of one query head, the same for any head where `heads` is None."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """The pattern as plain data, for YAML and config.json; `masks.mask_from_dict` is the inverse.

        Fields that have their default value are left out.
        """
        values = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return {"pattern": self.pattern} | {
            field.name: values[field.name] for field in fields(self) if values[field.name] != field.default
        }

    def dense(self, q_len: int, k_len: int, *, device: torch.device | str | None = None) -> Tensor:
        """The mask written out: bool `[q_len, k_len]`, True where the query sees the key. The truth for tests.

        A mask that differs by head gives `[heads, q_len, k_len]`.
        """
        i = torch.arange(k_len - q_len, k_len, device=device)
        j = torch.arange(k_len, device=device)
        return self.visible(i[:, None], j[None, :])

    def block_map(self, q_len: int, k_len: int, block_q: int, block_k: int) -> Tensor:
        """Which tiles a kernel has to walk: int8 `[ceil(q_len / block_q), ceil(k_len / block_k)]` of `Tile` values.

        Built in O(number of tiles), on the CPU. A tile may be called PARTIAL though it is EMPTY or FULL, not otherwise.
        A mask that differs by head gives one map a head.
        """
        if block_q < 1 or block_k < 1:
            raise ValueError(f"block_q and block_k must be at least 1, got {block_q} and {block_k}")
        queries, keys = range(k_len - q_len, k_len), range(k_len)
        return self.tile_map(
            [queries[at : at + block_q] for at in range(0, q_len, block_q)],
            [keys[at : at + block_k] for at in range(0, k_len, block_k)],
        )

    def tile_map(self, queries: Sequence[range], keys: Sequence[range]) -> Tensor:
        """As `block_map`, for tiles of any positions in even steps: int8 `[len(queries), len(keys)]`."""
        i, j = _span(queries), _span(keys)
        anything, everything = self.tiles(Span(*(t[:, None] for t in i)), Span(*(t[None, :] for t in j)))
        tiles = anything.to(torch.int8) + (anything & everything).to(torch.int8)
        return tiles.expand(*tiles.shape[:-2], len(queries), len(keys))

    def density(self, q_len: int, k_len: int) -> float:
        """The share of query-key pairs that is visible, in [0, 1]; counted row by row, so memory stays O(k_len)."""
        if q_len == 0 or k_len == 0:
            return 0.0
        j = torch.arange(k_len)[None, :]
        rows = torch.arange(k_len - q_len, k_len)[:, None].split(max(1, (1 << 20) // k_len))
        return sum(int(self.visible(i, j).sum()) for i in rows) / (q_len * k_len * (self.heads or 1))

    def draw(self, path: str | Path, q_len: int = 64, k_len: int | None = None) -> None:
        """Save a picture of the mask: queries downwards, keys to the right, visible pairs dark."""
        from attnzoo.masks.drawing import draw

        draw(self, path, q_len, q_len if k_len is None else k_len)

    def __str__(self) -> str:
        """As Python would write it, without the fields that have their default value."""
        values = ((field, getattr(self, field.name)) for field in fields(self))
        given = ", ".join(f"{field.name}={value}" for field, value in values if value != field.default)
        return f"{type(self).__name__}({given})"

    def __and__(self, other: Mask) -> Mask:
        from attnzoo.masks.combine import And

        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        from attnzoo.masks.combine import Or

        return Or(self, other) if isinstance(other, Mask) else NotImplemented


def check_integer(name: str, value: object, least: int) -> None:
    """ValueError, naming the argument, for what is not an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _span(ranges: Sequence[range]) -> Span:
    lo, hi, step = ([(r[0], r[-1], r.step if len(r) > 1 else 0)[side] for r in ranges] for side in range(3))
    return Span(*(torch.tensor(values, dtype=torch.int64) for values in (lo, hi, step)))


def _plain(value: Any) -> Any:
    """A field's value as YAML and JSON know it."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.to_dict() if isinstance(value, Mask) else value


def _json(value: Any) -> str:
    """JSON text of plain values; written out because torch.compile traces this and cannot trace the json module."""
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}": {_json(item)}' for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_json(item) for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) else f"{value}"


def mask_from_dict(data: Mapping[str, Any]) -> Mask:
    """The mask that `Mask.to_dict` described; what has a default may be left out.

    Raises:
        ValueError: for an unknown pattern, unknown or missing fields, or a value that the mask refuses.
    """
    room = importlib.import_module("attnzoo.masks")
    values = {key: _masks_in(item) for key, item in data.items()}
    cls = room.load_patterns().get(str(values.pop("pattern", None)))
    if cls is None:
        raise ValueError(f"mask pattern must be one of {sorted(Mask.patterns)}, got {data.get('pattern')!r}")
    known = {field.name for field in fields(cls)}
    needed = {field.name for field in fields(cls) if field.default is MISSING}
    if not needed <= set(values) <= known:
        raise ValueError(f"mask {cls.pattern!r} takes {sorted(known)}, got {sorted(values)}")
    return cls(**values)


def _masks_in(item: Any) -> Any:
    if isinstance(item, list | tuple):
        return tuple(_masks_in(part) for part in item)
    return mask_from_dict(item) if isinstance(item, Mapping) else item
