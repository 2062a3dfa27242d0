"""What a mask is: a rule that says which query sees which key, by position.

Positions are absolute, counted along the keys. With `q_len` queries and `k_len` keys the queries are the last ones
(bottom-right alignment), so query row r stands at position `r + k_len - q_len`:

    Causal, q_len 2, k_len 5        Causal, q_len 5, k_len 2
        1 1 1 1 0                       0 0
        1 1 1 1 1                       0 0
                                        0 0
                                        1 0
                                        1 1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path


class Tile(IntEnum):
    """What a block map says of one tile of the score matrix."""

    EMPTY = 0
    PARTIAL = 1
    FULL = 2


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

    def tiles(self, i_lo: Tensor, i_hi: Tensor, j_lo: Tensor, j_hi: Tensor) -> tuple[Tensor, Tensor]:
        """Whether anything, and whether everything, is visible in tiles of the score matrix, without looking inside.

        Args:
            i_lo, i_hi, j_lo, j_hi: first and last position (both included) of each tile's queries and keys.

        Returns:
            (anything, everything), bool. `anything` may be true of an empty tile and `everything` false of a full
            one, never the other way round: a kernel that trusts them can lose time, not correctness.
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The pattern as plain data, for YAML and config.json; `masks.mask_from_dict` is the inverse."""
        out: dict[str, Any] = {"pattern": self.pattern}
        for field in fields(self):
            value = getattr(self, field.name)
            value = list(value) if isinstance(value, tuple) else value
            out[field.name] = value.to_dict() if isinstance(value, Mask) else value
        return out

    def dense(self, q_len: int, k_len: int, *, device: torch.device | str | None = None) -> Tensor:
        """The mask written out: bool `[q_len, k_len]`, True where the query sees the key. The truth for tests."""
        i = torch.arange(k_len - q_len, k_len, device=device)
        j = torch.arange(k_len, device=device)
        return self.visible(i[:, None], j[None, :])

    def block_map(self, q_len: int, k_len: int, block_q: int, block_k: int) -> Tensor:
        """Which tiles a kernel has to walk: int8 `[ceil(q_len / block_q), ceil(k_len / block_k)]` of `Tile` values.

        Built in O(number of tiles), on the CPU. A tile may be called PARTIAL though it is EMPTY or FULL, not otherwise.
        """
        if block_q < 1 or block_k < 1:
            raise ValueError(f"block_q and block_k must be at least 1, got {block_q} and {block_k}")
        i_lo = torch.arange(0, q_len, block_q) + (k_len - q_len)
        i_hi = torch.clamp(i_lo + block_q, max=k_len) - 1
        j_lo = torch.arange(0, k_len, block_k)
        j_hi = torch.clamp(j_lo + block_k, max=k_len) - 1
        anything, everything = self.tiles(i_lo[:, None], i_hi[:, None], j_lo[None, :], j_hi[None, :])
        return (anything.to(torch.int8) + (anything & everything).to(torch.int8)).expand(len(i_lo), len(j_lo))

    def density(self, q_len: int, k_len: int) -> float:
        """The share of query-key pairs that is visible, in [0, 1]; counted row by row, so memory stays O(k_len)."""
        if q_len == 0 or k_len == 0:
            return 0.0
        j = torch.arange(k_len)[None, :]
        rows = torch.arange(k_len - q_len, k_len)[:, None].split(max(1, (1 << 20) // k_len))
        return sum(int(self.visible(i, j).sum()) for i in rows) / (q_len * k_len)

    def draw(self, path: str | Path, q_len: int = 64, k_len: int | None = None) -> None:
        """Save a picture of the mask: queries downwards, keys to the right, visible pairs dark."""
        from attnzoo.masks.drawing import draw

        draw(self, path, q_len, q_len if k_len is None else k_len)

    def __and__(self, other: Mask) -> Mask:
        from attnzoo.masks.combine import And

        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        from attnzoo.masks.combine import Or

        return Or(self, other) if isinstance(other, Mask) else NotImplemented


def _json(value: Any) -> str:
    """JSON text of plain values; written out because torch.compile traces this and cannot trace the json module."""
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}": {_json(item)}' for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_json(item) for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) else f"{value}"


def mask_from_dict(data: Mapping[str, Any]) -> Mask:
    """The mask that `Mask.to_dict` described. Raises ValueError for an unknown pattern or unknown fields."""
    values = {key: mask_from_dict(item) if isinstance(item, Mapping) else item for key, item in data.items()}
    cls = Mask.patterns.get(str(values.pop("pattern", None)))
    if cls is None:
        raise ValueError(f"mask pattern must be one of {sorted(Mask.patterns)}, got {data.get('pattern')!r}")
    known = {field.name for field in fields(cls)}
    if set(values) != known:
        raise ValueError(f"mask {cls.pattern!r} takes {sorted(known)}, got {sorted(values)}")
    return cls(**values)
