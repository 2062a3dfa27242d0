"""How many tokens each row of a cache holds, known on the host, so that no step waits for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo.ops.decoding.stored import Rows


class RowLengths:
    """Lengths of `batch_size` rows: one number while the rows are equal, else one a row plus what all gained since.

    Kept so that a decoding step changes a single integer: nothing is copied to or from the device, and torch.compile
    sees one number that varies.
    """

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self._device = device
        self.set([0] * batch_size)

    @property
    def uniform(self) -> bool:
        """Whether all rows are equally long."""
        return self._skew is None

    @property
    def longest(self) -> int:
        """Tokens in the longest row."""
        return self._gained + self._most

    @property
    def shortest(self) -> int:
        """Tokens in the shortest row."""
        return self._gained

    def value(self) -> int | Tensor:
        """One number if the rows are equally long, else one a row, `[B]` int64."""
        return self._gained if self._skew is None else self.tensor()

    def rows(self) -> Rows:
        """Tokens in each row, for kernels: nothing is computed on the device."""
        return Rows(self._gained, self._skew_tensor)

    def host(self) -> list[int]:
        """Tokens in each row."""
        skew = (0,) * self._batch_size if self._skew is None else self._skew
        return [self._gained + row for row in skew]

    def tensor(self) -> Tensor:
        """Tokens in each row, `[B]` int64 on the cache's device."""
        if self._skew_tensor is None:
            return torch.full((self._batch_size,), self._gained, dtype=torch.int64, device=self._device)
        return self._skew_tensor + self._gained

    def add(self, count: int) -> None:
        """Make every row longer by `count`."""
        self._gained += count

    def take(self, indices: Tensor) -> None:
        """Row b gets the length of row `indices[b]`. Waits for the device only if the rows differ."""
        if self.uniform:
            self.set([self._gained] * len(indices))
        else:
            before = self.host()
            self.set([before[index] for index in indices.tolist()])

    def set(self, lengths: Sequence[int]) -> None:
        """Replace the lengths (and with them the batch size)."""
        self._batch_size = len(lengths)
        least, most = (min(lengths), max(lengths)) if lengths else (0, 0)
        self._gained, self._most = least, most - least
        self._skew: tuple[int, ...] | None = None
        self._skew_tensor: Tensor | None = None
        if most > least:
            self._skew = tuple(row - least for row in lengths)
            self._skew_tensor = torch.tensor(self._skew, dtype=torch.int64, device=self._device)
