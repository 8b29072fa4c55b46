"""Bookkeeping of a paged KV cache: which pages are free, and who holds the others. Neither torch nor tensors.

A text's keys and values lie in pages of `page_tokens` tokens each, and a text's *block table* is the list of its pages
in order. The scheduler sees a cache as this; the tensors are added in sampling/cache.py.
"""

import heapq
from collections.abc import Sequence

# Tokens of one text in a forward pass: (block table, position of the first, how many).
Chunk = tuple[list[int], int, int]


class PagePool:
    """`num_pages` pages, handed out lowest number first. A page is free again when all its holders gave it back."""

    def __init__(self, num_pages: int, page_tokens: int):
        self.num_pages, self.page_tokens = num_pages, page_tokens
        self.free = list(range(num_pages))  # a heap; sorted, so one already
        self.holders = [0] * num_pages  # of each page: texts, and the prefix cache where it shares pages with them

    def pages_for(self, tokens: int) -> int:
        """How many pages hold so many tokens."""
        return -(-tokens // self.page_tokens)

    def take(self) -> int:
        """A free page, held once. IndexError where none is free."""
        page = heapq.heappop(self.free)
        self.holders[page] = 1
        return page

    def share(self, pages: Sequence[int]) -> None:
        """One more holder for each of these pages."""
        for page in pages:
            self.holders[page] += 1

    def give_back(self, pages: list[int]) -> None:
        """One holder less for each of these pages; empties the list."""
        for page in pages:
            self.holders[page] -= 1
            if not self.holders[page]:  # the last holder
                heapq.heappush(self.free, page)
        pages.clear()  # the caller's block table: nobody reads these pages through it again

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Contents of pages into others. Here there are none."""

    def close(self) -> None:
        """Gives the memory of the contents back. Here there is none."""
