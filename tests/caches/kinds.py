"""Every cache of keys and values by token, what its dead memory is, and the list of rows that it is held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.caches import ContiguousCache, Int8Cache, PagedCache, PagedInt8Cache, RollingCache
from attnzoo.caches.quantization import Int8Storage
from attnzoo.caches.ring import Ring
from attnzoo.caches.storage import Storage
from attnzoo.caches.token_cache import TokenCache
from attnzoo.masks import Causal, Mask, SlidingWindow

HEADS, ROOM, K_SIZE, V_SIZE = 2, 80, 4, 3
WINDOW, MARGIN, RESIDUAL, PAGES = 7, 4, 9, 12
CAUSAL = Causal()


@dataclass(frozen=True)
class Kind:
    """A cache and what is special about it."""

    make: Callable[..., TokenCache]
    mask: Mask = CAUSAL
    ring: int | None = None  # slots of the ring that holds tokens as they came
    symmetric: bool = True

    def new(self, batch_size: int = 3, **options: Any) -> TokenCache:
        """An empty cache; dead memory holds NaN, and table entries without a page hold rubbish."""
        sizes = {"num_kv_heads": HEADS, "head_dim": K_SIZE, "v_head_dim": V_SIZE, "dtype": torch.float64}
        cache = self.make(batch_size=batch_size, **{**sizes, **options})
        if cache.device.type != "meta":
            poison(cache)
        return cache


def _paged(cls: type[PagedCache]) -> Callable[..., TokenCache]:
    special = {"residual": RESIDUAL} if cls is PagedInt8Cache else {}
    return lambda **options: cls(**{"num_pages": PAGES, "page_size": 16, "max_length": ROOM, **special, **options})


KINDS = {
    "contiguous": Kind(lambda **options: ContiguousCache(**{"max_length": ROOM, **options})),
    "rolling": Kind(
        lambda **options: RollingCache(**{"window": WINDOW, "margin": MARGIN, **options}),
        SlidingWindow(WINDOW),
        WINDOW + MARGIN,
    ),
    "paged": Kind(_paged(PagedCache)),
    "int8": Kind(
        lambda **options: Int8Cache(**{"max_length": ROOM, "residual": RESIDUAL, **options}), CAUSAL, RESIDUAL
    ),
    "asymmetric int8": Kind(
        lambda **options: Int8Cache(**{"max_length": ROOM, "residual": 0, "symmetric": False, **options}),
        CAUSAL,
        0,
        False,
    ),
    "paged int8": Kind(_paged(PagedInt8Cache), CAUSAL, RESIDUAL),
}


@dataclass(frozen=True)
class Row:
    """What a row was given, less what was cropped, and from which position a ring still has it."""

    k: Tensor  # [Hk, n, D]
    v: Tensor
    since: int = 0

    @property
    def length(self) -> int:
        return self.k.shape[1]

    def grown(self, k: Tensor, v: Tensor, kind: Kind) -> Row:
        length = self.length + k.shape[1]
        since = self.since if kind.ring is None else max(self.since, length - kind.ring)
        return Row(torch.cat([self.k, k], 1), torch.cat([self.v, v], 1), since)

    def cut(self, length: int) -> Row:
        return Row(self.k[:, :length], self.v[:, :length], min(self.since, length))


EMPTY = Row(torch.empty(HEADS, 0, K_SIZE, dtype=torch.float64), torch.empty(HEADS, 0, V_SIZE, dtype=torch.float64))


def new_tokens(batch_size: int, count: int, **options: Any) -> tuple[Tensor, Tensor]:
    options = {"dtype": torch.float64, **options}
    return (
        torch.randn(batch_size, HEADS, count, K_SIZE, **options),
        torch.randn(batch_size, HEADS, count, V_SIZE, **options),
    )


def stacked(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """The rows as `[B, Hk, longest, D]`, with NaN behind their ends."""
    longest = max(row.length for row in rows)

    def fill(parts: list[Tensor]) -> Tensor:
        return torch.stack(
            [torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[1]), value=torch.nan) for part in parts]
        )

    return fill([row.k for row in rows]), fill([row.v for row in rows])


def poison(cache: TokenCache) -> None:
    """Fill everything that no row may read any more."""
    lengths = cache.row_lengths()
    if isinstance(cache, RollingCache):
        _poison_ring(cache._ring, lengths)
    else:
        for storage in cache._storages():
            blocks, _, size = storage.parts[0].shape[:3]
            alive = torch.zeros(blocks, size, dtype=torch.bool)
            for row, length in enumerate(lengths):
                if isinstance(cache, PagedCache):
                    for index, page in enumerate(cache.pages(row)):
                        alive[page, : min(length - index * size, size)] = True
                else:
                    alive[row, :length] = True
            _poison_storage(storage, ~alive)
    if isinstance(cache, PagedCache):
        for row in range(cache.batch_size):
            held = len(cache._pages[row])  # reserved pages are in the table and will be written to
            cache.table[row, held:] = torch.randint(-(2**31), 2**31 - 1, (cache.table.shape[1] - held,)).int()
    if cache._recent is not None:
        _poison_ring(cache._recent, lengths)


def _poison_ring(ring: Ring, lengths: list[int]) -> None:
    alive = torch.zeros(len(lengths), ring.size + ring.prefix, dtype=torch.bool)
    for row, (length, kept) in enumerate(zip(lengths, ring.kept.host(), strict=True)):
        for position in range(max(length - kept, 0), length):
            alive[row, position % ring.size] = True
        alive[row, ring.size : ring.size + min(ring.prefix, length)] = True
    for storage in (ring.k, ring.v):
        _poison_storage(storage, ~alive)


def _poison_storage(storage: Storage, dead: Tensor) -> None:
    for part in storage.parts:
        part.transpose(1, 2)[dead] = torch.nan if part.is_floating_point() else 77


def assert_holds(cache: TokenCache, rows: list[Row], kind: Kind) -> None:
    """The cache holds the rows: lengths, positions, and what it shows of each."""
    lengths = [row.length for row in rows]
    assert cache.row_lengths() == lengths == cache.lengths.tolist()
    assert (cache.length, cache.batch_size) == (max(lengths), len(rows))
    assert cache.uniform == (len(set(lengths)) == 1)
    keys, values = cache.view()
    firsts = [row.since if kind.mask != CAUSAL else 0 for row in rows]
    first = cache.first
    assert (first.tolist() if isinstance(first, Tensor) else [first] * len(rows)) == firsts
    shown = max(length - at for length, at in zip(lengths, firsts, strict=True))
    assert keys.shape == (len(rows), HEADS, shown, K_SIZE) and values.shape == (len(rows), HEADS, shown, V_SIZE)
    for b, row in enumerate(rows):
        for view, given in ((keys, row.k), (values, row.v)):
            got = view[b, :, : row.length - firsts[b]]
            exact = row.since if isinstance(cache._storages()[0], Int8Storage) else firsts[b]
            assert torch.equal(got[:, exact - firsts[b] :], given[:, exact:])
            if exact > firsts[b]:
                assert_within_half_a_step(got[:, :exact], given[:, :exact], kind.symmetric)


def half_a_step(given: Tensor, symmetric: bool) -> Tensor:
    """The most that int8 may change each number of `given [..., D]`."""
    if symmetric:
        return given.abs().amax(-1, keepdim=True) / 127 / 2
    return (given.amax(-1, keepdim=True) - given.amin(-1, keepdim=True)) / 255 / 2


def assert_within_half_a_step(got: Tensor, given: Tensor, symmetric: bool) -> None:
    rounding = 2e-6 * given.abs().amax(-1, keepdim=True)  # of the fp32 in which codes are made and read
    assert ((got - given).abs() <= half_a_step(given, symmetric) + rounding).all()
