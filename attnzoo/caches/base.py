"""What every cache of keys and values offers, whatever it keeps inside."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from attnzoo.ops.decoding import KeyValues


class Cache(ABC):
    """Keys and values of the tokens seen so far, row by row; rows may differ in length.

    A cache holds values, not gradients: what is appended is detached. Rows hold real tokens only: of a padded batch,
    `lengths` says how many each row got, and `attnzoo.caches.to_right_padding` turns left padding into right padding.
    """

    batch_size: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    max_length: int
    reach: int | None = None  # keys, its own included, that a new token's query may see; None: all of its row
    prefix: int = 0  # first tokens of each row that are held whatever is dropped: the view's first columns

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens in the longest row, known without asking the device."""

    @property
    @abstractmethod
    def uniform(self) -> bool:
        """Whether all rows are equally long, known without asking the device."""

    @property
    @abstractmethod
    def lengths(self) -> Tensor:
        """Tokens in each row, `[B]` int64."""

    @abstractmethod
    def row_lengths(self) -> list[int]:
        """Tokens in each row, known without asking the device."""

    @property
    def first(self) -> int | Tensor:
        """Position of the first token in the view: one number for all rows, or `[B]`. 0 unless tokens were dropped.

        With a `prefix`, column c holds position `first + c` from there on.
        """
        return 0

    @property
    def kept(self) -> int | None:
        """How many of each row's newest tokens are sure to be in the view; None: all."""
        return None

    def extend(self, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> KeyValues:
        """Append, and give what queries of these tokens attend to: the cache, or more than it goes on holding."""
        self.append(k, v, lengths)
        return self

    @abstractmethod
    def append(self, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> None:
        """Add tokens after each row's last; of row b's new tokens the first `lengths[b]` are real (None: all)."""

    @abstractmethod
    def view(self) -> tuple[Tensor, Tensor]:
        """Keys `[B, Hk, n, D]` and values `[B, Hk, n, Dv]` by position, from `first` on.

        Past a row's own length anything may stand.
        """

    @abstractmethod
    def crop(self, length: int) -> None:
        """Keep at most the first `length` tokens of each row."""

    @abstractmethod
    def reorder(self, indices: Tensor) -> None:
        """Row b becomes what row `indices[b]` was (beam search); the batch size stays."""

    @abstractmethod
    def select(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order; the batch size becomes their number."""

    @abstractmethod
    def repeat(self, count: int) -> None:
        """Make `count` neighbouring rows of each row (several samples of one prompt)."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all tokens; the memory stays."""


def host_lengths(lengths: Tensor, batch_size: int, most: int, name: str = "lengths") -> list[int]:
    """`lengths [B]` as a list, checked: integers from 0 to `most`. Waits for the device."""
    if lengths.shape != (batch_size,) or lengths.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name} is {lengths.dtype} of shape {list(lengths.shape)}; "
            f"it must be int64 or int32 of shape [{batch_size}]"
        )
    values: list[int] = lengths.tolist()
    if any(not 0 <= value <= most for value in values):
        raise ValueError(f"{name} is {values}; each must be from 0 to {most}")
    return values
