"""Prefix cache: keys and values of prompts that ran, found again by their first tokens. Neither torch nor tensors.

The samples of a prompt, the attempts at an extension and its two stages begin with the same hundreds of tokens, and
every prompt of a chat model with the same header. What a prompt begins with need not be computed again.

    root -> the first S tokens -> the next S -> ... -> the last, fewer than S

A tree whose nodes are pages: a node's key is the S tokens it holds, its place in the tree all tokens before. Looking a
prompt up costs one dictionary access a page, however many prompts are known; where no page matches as a whole, the one
that shares the longest beginning serves up to there. The least recently used leaf makes room.

Where the pages of the tree lie depends on the cache (sampling/cache.py), and is the only thing that does:

SharedPages   In the pages of the texts themselves, by reference count (block tables, on a GPU). Nobody writes to what
              another reads: a text writes after what it shares, and where that is in the middle of a page it copies it.
CopiedPages   In a pool of its own (streamed pages, on a CPU). There every page is multiplied by the queries of the one
              text that owns it, and a page with several owners would need as many queries of every page. A copy costs
              about a thousandth of computing the same tokens.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Protocol

from lengthen.sampling.pages import PagePool

NEAR = 64  # pages compared token by token where none matches as a whole: the newest


class PrefixPages(Protocol):
    """Where the pages of the tree lie. `pool` is the one that the tree's page numbers belong to."""

    pool: PagePool
    room: int  # the most pages that the tree may hold

    def keep(self, pages: Sequence[int]) -> list[int]:
        """Pages of `pool` with the contents of these pages of a text, held by the tree."""

    def shareable(self, tokens: int) -> int:
        """How many whole pages a text that begins with so many known tokens may hold itself."""

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Contents of pages of the tree into pages of a text."""

    def make_free(self, forget: Callable[[], bool]) -> bool:
        """Forget prefixes until a page is free for a text; False if that does not help."""


class SharedPages:
    """In the pages of the texts, of which the tree may hold `room` at a time."""

    def __init__(self, pool: PagePool, room: int):
        self.pool, self.room = pool, room

    def keep(self, pages: Sequence[int]) -> list[int]:
        self.pool.share(pages)
        return list(pages)

    def shareable(self, tokens: int) -> int:
        return tokens // self.pool.page_tokens  # the page that is known in part will be written to

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        self.pool.copy(source, target)

    def make_free(self, forget: Callable[[], bool]) -> bool:
        while not self.pool.free and forget():  # what a running text holds too is not free when it is forgotten
            pass
        return bool(self.pool.free)


class CopiedPages:
    """In `pool`, copied from and to the pages of `texts`."""

    def __init__(self, pool: PagePool, texts: PagePool):
        self.pool, self.texts, self.room = pool, texts, pool.num_pages

    def keep(self, pages: Sequence[int]) -> list[int]:
        copies = [self.pool.take() for _ in pages]  # there is room: the tree forgot as many before
        self.pool.copy(pages, copies, self.texts)
        return copies

    def shareable(self, tokens: int) -> int:
        return 0  # none: a streamed page has one owner

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        self.texts.copy(source, target, self.pool)

    def make_free(self, forget: Callable[[], bool]) -> bool:
        return False  # what the tree forgets is of no use to a text


class Node:
    """A page of the tree: the tokens it holds, after all those of its ancestors."""

    def __init__(self, tokens: tuple[int, ...] = (), parent: "Node | None" = None):
        self.tokens, self.parent, self.page = tokens, parent, -1
        self.children: dict[tuple[int, ...], Node] = {}


class PrefixCache:
    """The tree. It holds each of its pages once."""

    def __init__(self, pages: PrefixPages):
        self.pages, self.root = pages, Node()
        self.order: OrderedDict[Node, None] = OrderedDict()  # least recently used first; parents after their children

    def find(self, ids: Sequence[int]) -> tuple[list[int], int]:
        """(pages of the tree, how many of the first tokens they hold): never all of `ids`, one is left to compute."""
        page_tokens = self.pages.pool.page_tokens
        node: Node | None = self.root
        path: list[Node] = []
        known, limit = 0, len(ids) - 1
        while node and known < limit:
            rest = tuple(ids[known : min(known + page_tokens, limit)])  # of this page, at most
            child, same = node.children.get(rest), len(rest)
            if child is None:
                # No page with just these tokens: the child that begins like them, up to where it differs.
                near = islice(reversed(node.children.values()), NEAR)
                child = max(near, key=lambda other: common_prefix(other.tokens, rest), default=None)
                same = common_prefix(child.tokens, rest) if child else 0
            if not child or not same:
                break
            path.append(child)
            known += same
            node = child if same == page_tokens else None  # a page that matches in part is where the match ends
        self._touch(path)  # parents after children: a leaf is always the oldest
        return [node.page for node in path], known

    def keep(self, ids: Sequence[int], pages: Sequence[int]) -> None:
        """Remembers a computed prompt, whose keys and values lie in these pages of a text."""
        page_tokens, count = self.pages.pool.page_tokens, self.pages.pool.pages_for(len(ids))
        if count > self.pages.room:  # it would forget its own beginning
            return
        node, path, new = self.root, [], []
        for nth in range(count):
            tokens = tuple(ids[nth * page_tokens : (nth + 1) * page_tokens])
            child = node.children.get(tokens)
            if child is None:
                # Full: the oldest leaf goes, which is never on this path.
                if len(self.order) == self.pages.room:
                    self._forget()
                child = node.children[tokens] = Node(tokens, node)
                new.append(child)
            self.order[child] = None
            self.order.move_to_end(child)  # at once, so that it is not forgotten for its own successors
            path.append(child)
            node = child
        self._touch(path)
        if new:  # the last of the path: what is new has no children
            for node, page in zip(new, self.pages.keep(pages[count - len(new) : count]), strict=True):
                node.page = page

    def attach(self, pages: Sequence[int], tokens: int) -> tuple[list[int], list[int]]:
        """(pages that a text of these first tokens now holds too, pages to `copy`, which stay until `detach`)."""
        self.pages.pool.share(pages)  # also those to copy: making room for the copies must not free them
        shared = self.pages.shareable(tokens)
        return list(pages[:shared]), list(pages[shared:])

    def detach(self, pages: list[int]) -> None:
        """The pages to copy that `attach` gave are copied, or not needed."""
        self.pages.pool.give_back(pages)

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Contents of pages of the tree into pages of a text."""
        if source:
            self.pages.copy(source, target)

    def make_free(self) -> bool:
        """Forgets prefixes, the least recently used first, until a page is free for a text; False = none became so."""
        return self.pages.make_free(self._forget)

    def close(self) -> None:
        self.root, self.order = Node(), OrderedDict()
        self.pages.pool.close()

    def _touch(self, path: Sequence[Node]) -> None:
        for node in reversed(path):
            self.order.move_to_end(node)

    def _forget(self) -> bool:
        """The least recently used leaf; False if there is none."""
        if not self.order:
            return False
        oldest, _ = self.order.popitem(last=False)
        assert oldest.parent and not oldest.children, "a parent is used whenever its child is"
        del oldest.parent.children[oldest.tokens]  # nothing finds it any more
        self.pages.pool.give_back([oldest.page])
        return True


def common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many ids two sequences begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))
