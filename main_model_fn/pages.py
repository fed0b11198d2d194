"""Pages of a key-value cache: free, in use, or kept for whoever begins with the same tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

__all__ = ["Pages", "page_names"]


class Pages:
    """Says whose each page of `page_tokens` tokens is. A complete page can have several users.

    A page that nobody uses any more is kept while there are free ones, if its tokens are known:
    a request that begins with the same need not compute them. Those unused for longest go first.
    """

    def __init__(self, count: int, page_tokens: int) -> None:
        self.count, self.page_tokens = count, page_tokens
        self._free = list(reversed(range(count)))
        self._users = [0] * count
        self._kept: dict[int, None] = {}  # in the order in which they were let go
        self._name_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def used(self) -> int:
        """Pages that somebody uses."""
        return self.count - len(self._free) - len(self._kept)

    @property
    def kept(self) -> int:
        """Pages that nobody uses, with tokens that somebody may ask for."""
        return len(self._kept)

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The pages of these names, up to the first that there is none of."""
        found = []
        for name in names:
            if name not in self._page_of:
                break
            found.append(self._page_of[name])
        return found

    def hold(self, found: Sequence[int], more: int) -> list[int] | None:
        """Use pages that were found, and `more` new ones; None, and nothing done, without room."""
        if more > len(self._free) + len(self._kept) - sum(page in self._kept for page in found):
            return None
        for page in found:
            self._users[page] += 1
            self._kept.pop(page, None)
        return [*found, *(self._new() for _ in range(more))]

    def _new(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page = next(iter(self._kept))
            del self._kept[page]
            del self._page_of[self._name_of.pop(page)]
        self._users[page] = 1
        return page

    def name(self, page: int, name: bytes) -> None:
        """Say that a page in use is complete, unless another of the name is known."""
        if name not in self._page_of:
            self._page_of[name], self._name_of[page] = page, name

    def let_go(self, pages: Sequence[int]) -> None:
        """Of one user, in the order of its tokens: later pages are of no use without earlier ones."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._name_of:
                    self._kept[page] = None
                else:
                    self._free.append(page)


def page_names(tokens: Sequence[int], page_tokens: int, before: bytes = b"") -> list[bytes]:
    """A name for each complete page of `tokens`, which depends on all tokens up to its end.

    `before` is the name of the page before them. Names are 128-bit digests.
    """
    names = []
    for start in range(0, len(tokens) // page_tokens * page_tokens, page_tokens):
        page = np.asarray(tokens[start : start + page_tokens], np.int64)
        before = blake2b(before + page.tobytes(), digest_size=16).digest()
        names.append(before)
    return names
