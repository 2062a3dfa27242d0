"""A mask as the kernels read it: its structure, which they are compiled for, and its data, which they look up.

The structure is a program, a nested tuple such as `("and", ("stretch", ("causal",)), ("random_blocks", 0, 64, 3))`, in
which a model's fixed numbers stand themselves. What changes from batch to batch (documents, global tokens, lengths)
stands in tables, and the program only says in which slot, so that new documents never compile a kernel again.

What a query sees is often one stretch of neighbouring keys, and then what sees a key is a stretch of queries. All that
stands inside a `stretch` is such: a kernel finds both ends once a row, and compares each pair with these alone.

All tables lie in one tensor. It starts with two numbers a slot: where the slot's table starts, and how long it is.

A mask that differs by head becomes `("per_head", programs)`. Table 0 then has two numbers a head: which of the programs
it runs, and which slot that program calls its slot 0. Heads that differ in their data alone share a program.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnzoo.masks import (
    And,
    Blockwise,
    Causal,
    Dilated,
    Documents,
    Full,
    GlobalTokens,
    Mask,
    Or,
    PerHead,
    RandomBlocks,
    SlidingWindow,
)
from attnzoo.ops.softmax.triton.kept import Kept, upload

Program = tuple[Any, ...]

FAR = 1 << 29  # further than positions reach, so that sums of a few are still an int32


class Pattern(NamedTuple):
    """A mask as the kernels read it; the file's head describes both."""

    program: Program
    tables: Tensor  # int32, on the device


def lower(mask: Mask, q_heads: int, q_len: int, k_len: int, device: torch.device) -> Pattern:
    """The mask for kernels over these shapes, made once and kept.

    Args:
        mask: for any number of heads, or for `q_heads` of them; of a kind without `reasons`.

    Raises:
        RuntimeError: if it has to be made while a CUDA graph is captured.
    """
    # No table tells one negative position from another, so it does not matter how many queries there are.
    reach = 1 << max(10, (k_len - 1).bit_length())  # so that not each new length asks for new tables
    return _PATTERNS.get((mask.text, reach), device, lambda: _lower(mask, reach, device))


def reasons(mask: Mask) -> list[str]:
    """Why kernels cannot evaluate the mask: one for each pattern in it that is not of `attnzoo.masks`."""
    if type(mask) not in _LOWERED:
        return [f"cannot evaluate mask {mask.pattern!r} in a kernel"]
    return list(dict.fromkeys(reason for part in _parts(mask) for reason in reasons(part)))


def classes_of(mask: Mask) -> tuple[list[Mask], list[int]]:
    """The different masks that a mask's heads have, and which of them each head has; [0] if it is for any number."""
    if mask.heads is None:
        return [mask], [0]
    classes: dict[tuple[int, ...], int] = {}
    number = [classes.setdefault(key, len(classes)) for key in zip(*_differences(mask), strict=True)]
    return [mask.head(number.index(each)) for each in classes.values()], number


_PATTERNS: Kept[Pattern] = Kept(64)


def _lower(mask: Mask, length: int, device: torch.device) -> Pattern:
    tables = _Tables()
    classes, class_of_head = classes_of(mask)
    if len(classes) == 1:
        program = _program(classes[0], length, tables)
    else:
        program = _per_head(classes, class_of_head, length, tables)
    return Pattern(program, upload(tables.written(), device))


def _parts(mask: Mask) -> list[Mask]:
    """The masks that a mask is made of."""
    # By name, since torch.compile cannot ask an object for all that it holds.
    if isinstance(mask, PerHead):
        return list(mask.masks)
    if isinstance(mask, And | Or):
        return [mask.first, mask.second]
    return [mask.mask] if isinstance(mask, Blockwise) else []


def _differences(mask: Mask) -> list[list[int]]:
    """For each `PerHead` in a mask, numbers that tell the heads' masks apart, one a head."""
    if isinstance(mask, PerHead):
        numbers: dict[Mask, int] = {}
        return [[numbers.setdefault(part, len(numbers)) for part in mask.masks]]
    return [each for part in _parts(mask) for each in _differences(part)]


class _Tables:
    """Tables that a program asks for, each under a slot; equal ones share their data."""

    def __init__(self) -> None:
        self.base = 0  # programs count their slots from here
        self._slots: list[int] = []  # number of the data of each
        self._data: list[np.ndarray] = []
        self._known: dict[tuple[Mask, int], int] = {}

    def slot(self, mask: Mask, length: int, make: Callable[[], np.ndarray]) -> int:
        """A slot with the table of this mask over so many positions."""
        if (mask, length) not in self._known:
            self._known[mask, length] = len(self._data)
            self._data.append(make())
        self._slots.append(self._known[mask, length])
        return len(self._slots) - 1 - self.base

    def reserve(self) -> None:
        """Keep the first slot for what is known last."""
        self._slots.append(0)
        self._data.append(np.empty(0))

    def fill(self, values: np.ndarray) -> None:
        """Fill the reserved slot."""
        self._data[0] = values

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    def written(self) -> np.ndarray:
        """All of it as one row of numbers."""
        lengths = np.array([len(data) for data in self._data], dtype=np.int64)
        starts = 2 * len(self._slots) + np.cumsum(lengths) - lengths
        head = np.stack([starts[self._slots], lengths[self._slots]], axis=-1) if self._slots else np.zeros(1)
        return np.concatenate([head.ravel(), *self._data])


def _per_head(classes: list[Mask], class_of_head: list[int], length: int, tables: _Tables) -> Program:
    """Slot 0 leads each head to its program and its tables."""
    tables.reserve()
    programs: dict[Program, int] = {}
    ways = []
    for each in classes:
        tables.base = tables.num_slots
        program = _program(each, length, tables)
        ways.append((programs.setdefault(program, len(programs)), tables.base))
    tables.fill(np.array(ways)[class_of_head].ravel())
    return "per_head", tuple(programs)


def _program(mask: Mask, length: int, tables: _Tables) -> Program:
    """The program of a mask of one head over so many positions, or blocks of them."""
    stretches, others = _asked(mask, length, tables)
    whole: list[Program] = [("stretch", _all_of(stretches or [("full",)]))] if stretches or not others else []
    return _all_of([*whole, *others])


def _all_of(programs: list[Program]) -> Program:
    return reduce(lambda first, second: ("and", first, second), programs)


_Asked = tuple[list[Program], list[Program]]  # what must hold, all of it: stretches, and programs of other kinds


def _asked(mask: Mask, length: int, tables: _Tables) -> _Asked:
    lowered = _LOWERED.get(type(mask))
    if lowered is None:
        raise TypeError("; ".join(reasons(mask)))
    return lowered(mask, length, tables)


def _and(mask: And, length: int, tables: _Tables) -> _Asked:
    first, second = _asked(mask.first, length, tables), _asked(mask.second, length, tables)
    return first[0] + second[0], first[1] + second[1]


def _or(mask: Or, length: int, tables: _Tables) -> _Asked:
    return [], [("or", _program(mask.first, length, tables), _program(mask.second, length, tables))]


def _blockwise(mask: Blockwise, length: int, tables: _Tables) -> _Asked:
    asked = _asked(mask.mask, -(-length // mask.block), tables)
    stretches, others = ([("blockwise", min(mask.block, FAR), _all_of(part))] if part else [] for part in asked)
    return stretches, others


def _dilated(mask: Dilated, length: int, tables: _Tables) -> _Asked:
    window, ahead = (mask.window - 1) * mask.dilation + 1, mask.ahead * mask.dilation
    return [_sliding_window(window, ahead)], [("every", min(mask.dilation, FAR))] if mask.dilation > 1 else []


def _sliding_window(window: int, ahead: int) -> Program:
    return "sliding_window", min(window, FAR), min(ahead, FAR)


def _documents(mask: Documents, length: int, tables: _Tables) -> _Asked:
    def first_and_last_of_each_position() -> np.ndarray:  # [positions * 2]
        bounds = np.minimum(np.array(mask.cu_seqlens), length)
        ends = np.stack([bounds[:-1], bounds[1:] - 1], axis=-1)
        return np.repeat(ends, np.diff(bounds), axis=0).ravel()

    return [("documents", tables.slot(mask, length, first_and_last_of_each_position))], []


def _global_tokens(mask: GlobalTokens, length: int, tables: _Tables) -> _Asked:
    def whether_each_position_is_one() -> np.ndarray:
        tokens = np.array(mask.tokens)
        return np.bincount(tokens[tokens < length])

    if isinstance(mask.tokens, int):
        number = min(mask.tokens, FAR)
        return [], [("first_tokens", tables.slot(mask, length, lambda: np.array([number])))]
    return [], [("global_tokens", tables.slot(mask, length, whether_each_position_is_one))]


def _random_blocks(mask: RandomBlocks, length: int, tables: _Tables) -> _Asked:
    def drawn_for_each_block() -> np.ndarray:  # [blocks * per_row]
        rows = torch.arange(-(-length // mask.block))
        drawn = [mask.drawn(rows, stretch) for stretch in range(mask.per_row)]
        return torch.stack(drawn, dim=-1).numpy().ravel() if drawn else np.empty(0)

    slot = tables.slot(mask, length, drawn_for_each_block)
    return [], [("random_blocks", slot, min(mask.block, FAR), mask.per_row)]


_LOWERED: dict[type[Mask], Callable[[Any, int, _Tables], _Asked]] = {
    And: _and,
    Blockwise: _blockwise,
    Causal: lambda mask, length, tables: ([("causal",)], []),
    Dilated: _dilated,
    Documents: _documents,
    Full: lambda mask, length, tables: ([], []),
    GlobalTokens: _global_tokens,
    Or: _or,
    PerHead: lambda mask, length, tables: ([], []),  # `_lower` has taken it apart
    RandomBlocks: _random_blocks,
    SlidingWindow: lambda mask, length, tables: ([_sliding_window(mask.window, mask.ahead)], []),
}
