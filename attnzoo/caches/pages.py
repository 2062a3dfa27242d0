"""Which pages of a pool are free, and how many rows share each of the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class OutOfPages(ValueError):
    """A pool has fewer free pages than are needed. Nothing has changed, so rows can be freed and the call repeated."""


class PagePool:
    """Counts references; the pages' contents are elsewhere.

    Args:
        count: pages there are.
    """

    def __init__(self, count: int) -> None:
        self.references = [0] * count
        self._free = list(reversed(range(count)))  # the last one is given out next

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free pages, now held once each. OutOfPages, and nothing has changed, if there are fewer."""
        if count > self.free:
            total = len(self.references)
            raise OutOfPages(f"out of pages: {count} more are needed, and {self.free} of {total} are free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self.references[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Hold each of the pages, which are held already, once more."""
        for page in pages:
            self.references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Hold each of the pages once less; those that nobody holds then are free."""
        for page in pages:
            self.references[page] -= 1
            if self.references[page] == 0:
                self._free.append(page)

    def check(self, pages: Sequence[int]) -> None:
        """ValueError unless all of them are pages of the pool that somebody holds."""
        total = len(self.references)
        if any(not 0 <= page < total for page in pages):
            raise ValueError(f"pages is {list(pages)}; each must be from 0 to {total - 1}")
        if free := [page for page in pages if not self.references[page]]:
            raise ValueError(f"pages is {list(pages)}; of these {free} are free and hold nothing")
