"""The prefix cache against a search through all prompts, its pages shared with the texts.

python -m pytest -q tests/test_prefix_cache.py
"""

import random

import torch

from lengthen.sampling.cache import LayerShape, PagedCache
from lengthen.sampling.prefix_cache import Node, PrefixCache, common_prefix

SHAPES = {0: LayerShape(1, 1, 1, 0), 3: LayerShape(1, 1, 1, 0)}
S = 4  # tokens in a page


def make(texts: int, room: int) -> tuple[PagedCache, PrefixCache]:
    """A cache with pages for texts, and for `room` pages of prefixes."""
    cache = PagedCache(SHAPES, texts + room, S, torch.device("cpu"), torch.float32)
    return cache, PrefixCache(cache, room)


def number(ids: list[int], layer: int) -> int:
    """Says which tokens it stands after, and in which layer."""
    return hash(tuple(ids)) % 1_000_003 + layer


def write(cache: PagedCache, ids: list[int]) -> list[int]:
    """Pages with the keys and values of a text."""
    pages = [cache.take() for _ in range(cache.pages_for(len(ids)))]
    for layer, pool in cache.layers.items():
        for i in range(len(ids)):
            key, value = pool.keys[pages[i // S], 0].view(S), pool.values[pages[i // S], 0].view(S)
            key[i % S] = value[i % S] = number(ids[: i + 1], layer)
    return pages


def read(cache: PagedCache, pages: list[int], count: int) -> list[list[float]]:
    keys = [pool.keys[pages].flatten()[:count].tolist() for pool in cache.layers.values()]
    assert keys == [pool.values[pages].flatten()[:count].tolist() for pool in cache.layers.values()]
    return keys


def remember(cache: PagedCache, prefixes: PrefixCache, ids: list[int]) -> None:
    pages = write(cache, ids)
    prefixes.keep(ids, pages)
    cache.give_back(pages)


def attach(cache: PagedCache, prefixes: PrefixCache, ids: list[int]) -> int:
    """What a new text does: checks that the pages it gets hold what they should; returns how many tokens it got."""
    found, count = prefixes.find(ids)
    own, copied = prefixes.attach(found, count)
    pages = own + [cache.take() for _ in copied]
    prefixes.copy(copied, pages[len(own) :])
    prefixes.detach(copied)
    want = [[number(ids[: i + 1], layer) for i in range(count)] for layer in SHAPES]
    assert len(pages) == -(-count // S) and read(cache, pages, count) == want
    assert len(own) == count // S
    cache.give_back(pages)
    return count


def test_the_longest_known_beginning_is_found_with_its_contents():
    """Random prompts over 3 ids, so that many share beginnings; with room for all of them."""
    rng, known = random.Random(0), []
    cache, prefixes = make(16, 400)
    for _ in range(120):
        ids = [rng.randrange(3) for _ in range(rng.randrange(1, 20))]
        best = max((common_prefix(ids, other) for other in known), default=0)
        assert attach(cache, prefixes, ids) == min(best, len(ids) - 1)
        remember(cache, prefixes, ids)
        known.append(ids)


def test_the_least_recently_used_make_room():
    cache, prefixes = make(4, 6)
    prompts = [[n] * 8 for n in range(4)]  # two pages each
    for n in (0, 1, 2, 0, 3):  # 0 is used again, so 1 is the oldest when 3 comes
        remember(cache, prefixes, prompts[n])
        assert len(prefixes.order) <= 6
    assert [attach(cache, prefixes, [*prompts[n], 9]) for n in range(4)] == [8, 0, 8, 8]
    prefixes.find([*prompts[2], 9])
    remember(cache, prefixes, [7, 7, 7, 7, 7])  # now 0 is: its last page goes before its first
    assert [attach(cache, prefixes, [*prompts[n], 9]) for n in range(4)] == [0, 0, 8, 8]


def test_random_use_keeps_the_tree_whole():
    """What is found is right however often pages were taken over; every page is free or in the tree, once."""
    rng = random.Random(1)
    cache, prefixes = make(16, 12)
    pool = prefixes.pool
    for _ in range(400):
        ids = [rng.randrange(2) for _ in range(rng.randrange(1, 30))]
        attach(cache, prefixes, ids)
        remember(cache, prefixes, ids)
        tree = list(nodes(prefixes.root))
        assert sorted([node.page for node in tree] + pool.free) == list(range(pool.num_pages))
        assert all(pool.holders[node.page] == 1 for node in tree)
        assert set(tree) == set(prefixes.order) and len(tree) <= 12


def nodes(node: Node):
    for child in node.children.values():
        yield child
        yield from nodes(child)


def test_a_prompt_larger_than_the_room_is_not_kept():
    cache, prefixes = make(4, 2)
    remember(cache, prefixes, list(range(12)))
    assert not prefixes.order and prefixes.find(list(range(12))) == ([], 0)
    prefixes.close()
    assert prefixes.find([1, 2, 3]) == ([], 0)


def test_only_shared_pages_are_of_use_to_a_text_that_has_none():
    """A page that somebody reads is not free when the tree forgets it; without such readers prefixes make room. How
    many pages that would make is known beforehand."""
    cache, prefixes = make(2, 4)
    remember(cache, prefixes, list(range(8)))
    while cache.free:
        cache.take()
    assert prefixes.spare() == 2
    pages, count = prefixes.find([*range(8), 9])
    own, _ = prefixes.attach(pages, count)
    assert prefixes.spare() == 0 and not prefixes.make_free() and not prefixes.order
    cache.give_back(own)
    assert prefixes.make_free()
