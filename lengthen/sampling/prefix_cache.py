"""Keys and values of prompts that have run, found again by their first tokens.

The samples of a prompt, the tries of an extension and its two stages begin with the same hundreds of tokens, and every
prompt of a chat model with the same header. What a prompt began with need not be computed again.

    root (one an adapter) -> the first S tokens -> the next S -> ... -> the last, fewer than S

A tree whose nodes are pages: a node's key is the S tokens it holds, its place in the tree all tokens before. Looking a
prompt up costs one dictionary access a page, however many prompts are known; where no page matches as a whole, the one
that begins like the rest serves up to there. The least recently used leaf makes room.

On a GPU the pages are the texts' own, held by the tree and by every text that begins with them. Nobody writes to what
another reads: a text writes behind what it shares, and where that is in the middle of a page it takes a copy of it.

On a CPU the pages are copies, in a pool of their own: there every page is multiplied by the queries of the one text
that owns it (attention.py), and a page of several owners would need as many queries of every page. A copy costs about
a thousandth of computing the same tokens.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from itertools import islice

from lengthen.sampling.attend_cpu import PagedCache

NEAR = 64  # pages compared token by token where none matches as a whole: the newest


class Node:
    """A page: the tokens it holds, behind all those of its ancestors."""

    def __init__(self, tokens: tuple[int, ...] = (), page: int = -1, parent: "Node | None" = None):
        self.tokens, self.page, self.parent = tokens, page, parent
        self.children: dict[tuple[int, ...], Node] = {}


class PrefixCache:
    """The tree and its pool. `adapter` is any key: keys and values of one adapter are of no use to another.

    room: the most pages that it holds of a pool that it shares with the texts; 0 = the pool is its own.
    """

    def __init__(self, pool: PagedCache | None, room: int = 0):
        self.pool, self.shares = pool, room > 0  # None = nothing is kept
        self.room = room or (pool.num_pages if pool else 0)
        self.free = list(range(pool.num_pages)) if pool and not room else []
        self.roots: dict[Hashable, Node] = {}
        self.order: OrderedDict[Node, None] = OrderedDict()  # least recently used first; parents behind their children

    def clear(self) -> None:
        self.__init__(None)

    def find(self, adapter: Hashable, ids: Sequence[int]) -> tuple[list[int], int]:
        """(pages of the pool, how many of the first tokens they hold): never all of `ids`, one is left to compute."""
        node, path, known, limit = self.roots.get(adapter), [], 0, len(ids) - 1
        while node and known < limit:
            rest = tuple(ids[known : min(known + self.pool.page_tokens, limit)])
            child, same = node.children.get(rest), len(rest)
            if child is None:
                near = islice(reversed(node.children.values()), NEAR)
                child = max(near, key=lambda one: common_prefix(one.tokens, rest), default=None)
                same = common_prefix(child.tokens, rest) if child else 0
            if not same:
                break
            path.append(child)
            known += same
            node = child if same == self.pool.page_tokens else None
        self._touch(path)
        return [node.page for node in path], known

    def keep(self, adapter: Hashable, ids: Sequence[int], pool: PagedCache, pages: Sequence[int]) -> None:
        """Remembers a computed prompt, whose keys and values lie in these pages of the texts' pool."""
        if not self.pool or self.pool.pages_for(len(ids)) > self.room:
            return
        node, path, source, target = self.roots.setdefault(adapter, Node()), [], [], []
        for nth in range(self.pool.pages_for(len(ids))):
            tokens = tuple(ids[nth * self.pool.page_tokens : (nth + 1) * self.pool.page_tokens])
            child = node.children.get(tokens)
            if child is None:
                if len(self.order) == self.room:
                    self._forget()
                child = node.children[tokens] = Node(tokens, pages[nth], node)
                if self.shares:
                    self.pool.share([child.page])
                else:
                    child.page = self.free.pop()
                    source.append(pages[nth])
                    target.append(child.page)
            self.order[child] = None
            self.order.move_to_end(child)  # at once, so that it is not forgotten for its own successors
            path.append(child)
            node = child
        self._touch(path)
        if target:
            self.pool.copy(source, target, pool)

    def lend(self, pages: Sequence[int], tokens: int) -> tuple[list[int], list[int]]:
        """(pages that a text of these first tokens may hold itself, pages to copy), which stay until `copied`."""
        whole = tokens // self.pool.page_tokens if self.shares else 0
        if self.shares:
            self.pool.share(pages)
        return list(pages[:whole]), list(pages[whole:])

    def copied(self, pages: list[int]) -> None:
        """The pages to copy that `lend` gave: done."""
        if self.shares:
            self.pool.give_back(pages)

    def give_way(self) -> bool:
        """Forgets shared pages, the least recently used first, until one is free; False = none came free."""
        while self.shares and self.order and not self.pool.free:
            self._forget()
        return self.shares and bool(self.pool.free)

    def _touch(self, path: Sequence[Node]) -> None:
        for node in reversed(path):
            self.order.move_to_end(node)

    def _forget(self) -> None:
        oldest, _ = self.order.popitem(last=False)
        assert not oldest.children, "a parent is used whenever its child is"
        del oldest.parent.children[oldest.tokens]
        if self.shares:
            self.pool.give_back([oldest.page])
        else:
            self.free.append(oldest.page)


def common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many ids two sequences begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))
