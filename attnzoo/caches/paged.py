"""Rows made of pages from one pool: memory as it is needed, and prefixes that rows share (vLLM, arXiv:2309.06180)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo.caches.pages import PagePool
from attnzoo.caches.places import places
from attnzoo.caches.storage import Storage
from attnzoo.caches.token_cache import TokenCache, check_least
from attnzoo.ops.decoding.stored import Stored


class PagedCache(TokenCache):
    """Keys `[num_pages, Hk, page_size, D]` and values; row b's token p is in page `table[b, p // page_size]`.

    The table, `[B, max_pages]` int32, is on the cache's device for kernels and gathers to read; which page is whose is
    decided on the host, so appends wait for nothing. Entries of the table past a row's last page hold anything.

    Rows share pages after `fork`, `repeat`, `reorder`, `select` and `adopt`, none of which copies keys or values.
    Before a row writes into a page that others hold too, it gets a copy of its own.

    Pages are taken when tokens come, which is work on the host. `reserve` takes them beforehand: appends within what is
    reserved touch nothing but tensors, and under torch.compile all of them can be the same graph.

    Args:
        batch_size: rows.
        num_kv_heads: heads of keys and values.
        num_pages: pages in the pool, shared by all rows.
        head_dim: size of a key.
        v_head_dim: size of a value; None: `head_dim`.
        page_size: tokens a page, a power of two and at least 16.
        max_length: tokens that a row may have; None: as many as fit in all pages.
        dtype: of keys and values.
        device: of keys and values.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        num_pages: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        page_size: int = 64,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_least("num_pages", num_pages, 1)
        if page_size < 16 or page_size & (page_size - 1):
            raise ValueError(f"page_size is {page_size}; it must be a power of two and at least 16")
        longest = num_pages * page_size if max_length is None else max_length
        super().__init__(batch_size, num_kv_heads, longest, head_dim, v_head_dim, dtype, device)
        self.num_pages, self.page_size = num_pages, page_size
        self._k, self._v = self._storage(self.head_dim), self._storage(self.v_head_dim)
        self.table = torch.zeros(batch_size, -(-longest // page_size), dtype=torch.int32, device=self.device)
        self._pool = PagePool(num_pages)
        self._pages: list[list[int]] = [[] for _ in range(batch_size)]  # the table on the host, with reserved pages
        self._ready = 0  # tokens that each row can take into pages that it holds alone

    @property
    def free_pages(self) -> int:
        """Pages that no row holds."""
        return self._pool.free

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, whether filled or not."""
        return super().nbytes + self.table.nbytes

    def pages(self, row: int) -> tuple[int, ...]:
        """The pages that hold a row's tokens, in order."""
        self._check_rows([row])
        return tuple(self._pages[row][: self._count(self.row_lengths()[row])])

    def reserve(self, count: int) -> None:
        """Take the pages for `count` more tokens of every row now.

        What takes tokens away or moves rows gives them back: crop, fork, repeat, reorder, select, adopt.

        Raises:
            OutOfPages: if there are too few, ValueError if `max_length` is passed. Nothing has changed then.
        """
        check_least("count", count, 0)
        self._check_room(self.length + count, count)
        self._claim([row + count for row in self.row_lengths()])
        self._count_ready(self.row_lengths())

    def stored(self) -> Stored:
        return self._stored(self._k.parts, self._v.parts, self.table)

    def fork(self, row: int, into: Sequence[int]) -> None:
        """Make the rows `into` twins of `row`, sharing its pages; what they held is released."""
        self._check_rows([row, *into])
        self.reorder(torch.tensor([row if b in into else b for b in range(self.batch_size)], device=self.device))

    def free(self, rows: Sequence[int]) -> None:
        """Empty these rows and release their pages, so that others can have them and the rows can be filled anew."""
        self._check_rows(rows)
        self._crop([0 if b in rows else length for b, length in enumerate(self.row_lengths())])

    def adopt(self, row: int, pages: Sequence[int], length: int) -> None:
        """Make the `length` tokens in `pages`, which other rows hold, those of `row`; what it held is released.

        For a prefix that is known to be the same, as `pages(other_row)[:n]` gives it.

        Raises:
            ValueError: for pages out of range, pages that nobody holds, or a length that they do not fit.
        """
        self._check_rows([row])
        self._pool.check(pages)
        if self._count(length) != len(pages) or not 0 <= length <= self.max_length:
            raise ValueError(
                f"length is {length}; {len(pages)} pages of {self.page_size} hold from "
                f"{max(len(pages) - 1, 0) * self.page_size + bool(pages)} to {len(pages) * self.page_size} tokens, "
                f"and max_length is {self.max_length}"
            )
        self._pool.share(pages)
        self.free([row])
        self._assign([(row, index, page) for index, page in enumerate(pages)])
        lengths = self.row_lengths()
        lengths[row] = length
        self._rows.set(lengths)
        self._count_ready(lengths)
        if self._recent is not None:
            kept = self._recent.kept.host()
            kept[row] = 0
            self._recent.kept.set(kept)

    def _storage(self, dim: int) -> Storage:
        return Storage(self.num_pages, self.num_kv_heads, self.page_size, dim, self.dtype, self.device)

    def _storages(self) -> tuple[Storage, ...]:
        return self._k, self._v

    def _write(self, k: Tensor, v: Tensor, counts: list[int] | None) -> None:
        new = k.shape[2]
        if counts is None and new <= self._ready:
            self._ready -= new
        else:
            added = [new] * self.batch_size if counts is None else counts
            ends = [row + count for row, count in zip(self.row_lengths(), added, strict=True)]
            self._claim(ends)
            self._count_ready(ends)
        at = places(self._rows.value(), new, counts, self.batch_size, self.device)
        pages = self.table[at.rows, at.positions // self.page_size].long()
        slots = at.positions % self.page_size
        self._k.write(pages, slots, at.of(k))
        self._v.write(pages, slots, at.of(v))

    def _read(self) -> tuple[Tensor, Tensor]:
        # Token by token, not page by page: shapes then follow from the length alone, for torch.compile's sake.
        positions = torch.arange(self.length, device=self.device)
        pages = self.table[:, positions // self.page_size].long()  # [B, n]
        if not self.uniform:
            pages = torch.where(positions < self.lengths.unsqueeze(1), pages, 0)
        slots = positions.unsqueeze(0) % self.page_size
        return self._k.read(pages, slots), self._v.read(pages, slots)

    def _move(self, indices: Tensor, in_place: bool) -> None:
        lengths = self.row_lengths()
        order: list[int] = indices.tolist()
        before, self._pages = self._pages, [self._pages[b][: self._count(lengths[b])] for b in order]
        for held in self._pages:
            self._pool.share(held)
        for held in before:
            self._pool.release(held)
        table = self.table.index_select(0, indices)
        self.table = self.table.copy_(table) if in_place else table
        self._count_ready([lengths[b] for b in order])

    def _shrink(self, ends: list[int]) -> None:
        for held, end in zip(self._pages, ends, strict=True):
            self._pool.release(held[self._count(end) :])
            del held[self._count(end) :]
        self._count_ready(ends)

    def _claim(self, ends: list[int]) -> None:
        """Give each row that grows the pages up to its new end, all that it will write to its own; or OutOfPages."""
        grown = [(b, i) for b, end in enumerate(ends) for i in range(len(self._pages[b]), self._count(end))]
        writers: dict[int, list[tuple[int, int]]] = {}  # of pages that are partly filled, by page
        for b, (length, end) in enumerate(zip(self.row_lengths(), ends, strict=True)):
            if end > length and length % self.page_size:
                last = length // self.page_size
                writers.setdefault(self._pages[b][last], []).append((b, last))
        copied = []
        for page, where in writers.items():
            # If nobody else holds the page, one of its writers can go on with it.
            copied += [(at, page) for at in where[len(where) == self._pool.references[page] :]]
        taken = self._pool.take(len(grown) + len(copied))
        targets = taken[: len(copied)]
        sources = [page for _, page in copied]
        if sources:
            for storage in self._storages():
                storage.copy(*(torch.tensor(pages, device=self.device) for pages in (sources, targets)))
            self._pool.release(sources)
        places = [at for at, _ in copied] + grown
        self._assign([(b, i, page) for (b, i), page in zip(places, taken, strict=True)])

    def _assign(self, entries: list[tuple[int, int, int]]) -> None:
        """Write (row, index, page) into the table, here and on the device."""
        for row, index, page in entries:
            held = self._pages[row]
            held[index : index + 1] = [page]
        if entries:
            rows, columns, pages = torch.tensor(entries).to(self.device).unbind(1)
            self.table[rows, columns] = pages.int()

    def _count(self, length: int) -> int:
        """Pages that hold `length` tokens."""
        return -(-length // self.page_size)

    def _count_ready(self, lengths: list[int]) -> None:
        room = []
        for length, held in zip(lengths, self._pages, strict=True):
            shared = length % self.page_size and self._pool.references[held[length // self.page_size]] > 1
            room.append(0 if shared else len(held) * self.page_size - length)
        self._ready = min(room)

    def _check_rows(self, rows: Sequence[int]) -> None:
        if any(not 0 <= row < self.batch_size for row in rows):
            raise ValueError(f"rows is {list(rows)}; each must be from 0 to {self.batch_size - 1}")
