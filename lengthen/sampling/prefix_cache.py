"""Prefix cache: keys and values of prompts that ran, found again by their first tokens. Neither torch nor tensors.

The samples of a prompt, the attempts at an extension and its two stages begin with the same hundreds of tokens, and
every prompt of a chat model with the same header. What a prompt begins with need not be computed again.

    root -> the first S tokens -> the next S -> ... -> the last, fewer than S

A tree whose nodes are pages: a node's key is the S tokens it holds, its place in the tree all tokens before. Looking a
prompt up costs one dictionary access a page, however many prompts are known; where no page matches as a whole, the one
that shares the longest beginning serves up to there. The least recently used leaf makes room.

The pages of the tree are those of the texts themselves, held by reference count. Nobody writes to what another reads: a
text writes after what it shares, and where that is in the middle of a page it copies it. Prefixes are forgotten, oldest
first, when a text needs their pages.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

from lengthen.sampling.pages import PagePool

NEAR = 64  # pages compared token by token where none matches as a whole: the newest


class Node:
    """A page of the tree: the tokens it holds, after all those of its ancestors."""

    def __init__(self, tokens: tuple[int, ...] = (), parent: "Node | None" = None):
        self.tokens, self.parent, self.page = tokens, parent, -1
        self.children: dict[tuple[int, ...], Node] = {}


class PrefixCache:
    """The tree. It holds each of its pages once; at most `room` of the pool's."""

    def __init__(self, pool: PagePool, room: int):
        self.pool, self.room, self.root = pool, room, Node()
        self.order: OrderedDict[Node, None] = OrderedDict()  # least recently used first; parents after their children

    def find(self, ids: Sequence[int]) -> tuple[list[int], int]:
        """(pages of the tree, how many of the first tokens they hold): never all of `ids`, one is left to compute."""
        page_tokens = self.pool.page_tokens
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
        page_tokens, count = self.pool.page_tokens, self.pool.pages_for(len(ids))
        if count > self.room:  # it would forget its own beginning
            return
        node, path, new = self.root, [], []
        for nth in range(count):
            tokens = tuple(ids[nth * page_tokens : (nth + 1) * page_tokens])
            child = node.children.get(tokens)
            if child is None:
                # Full: the oldest leaf goes, which is never on this path.
                if len(self.order) == self.room:
                    self._forget()
                child = node.children[tokens] = Node(tokens, node)
                new.append(child)
            self.order[child] = None
            self.order.move_to_end(child)  # at once, so that it is not forgotten for its own successors
            path.append(child)
            node = child
        self._touch(path)
        if new:  # the last of the path: what is new has no children
            self.pool.share(pages[count - len(new) : count])
            for node, page in zip(new, pages[count - len(new) : count], strict=True):
                node.page = page

    def attach(self, pages: Sequence[int], tokens: int) -> tuple[list[int], list[int]]:
        """(pages that a text of these first tokens now holds too, pages to `copy`, which stay until `detach`)."""
        self.pool.share(pages)  # also those to copy: making room for the copies must not free them
        shared = tokens // self.pool.page_tokens  # the page that is known in part will be written to
        return list(pages[:shared]), list(pages[shared:])

    def detach(self, pages: list[int]) -> None:
        """The pages to copy that `attach` gave are copied, or not needed."""
        self.pool.give_back(pages)

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Contents of pages of the tree into pages of a text."""
        if source:
            self.pool.copy(source, target)

    def make_free(self) -> bool:
        """Forgets prefixes, the least recently used first, until a page is free for a text; False = none became so."""
        while not self.pool.free and self._forget():  # what a running text holds too is not free when it is forgotten
            pass
        return bool(self.pool.free)

    def spare(self) -> int:
        """Pages that only the tree holds: they are free as soon as a text needs them."""
        return sum(self.pool.holders[node.page] == 1 for node in self.order)

    def close(self) -> None:
        self.root, self.order = Node(), OrderedDict()
        self.pool.close()

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
        self.pool.give_back([oldest.page])
        return True


def common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many ids two sequences begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))
