"""The tree of prompts that ran, against a search through all of them.

python -m pytest -q tests/test_prefix.py
"""

import random

import torch

from lengthen.sampling.attend_cpu import LayerShape, PagedCache
from lengthen.sampling.prefix_cache import Node, PrefixCache, common_prefix

SHAPES = {0: LayerShape(1, 1, 1, 0), 3: LayerShape(1, 1, 1, 0)}
S = 4  # tokens in a page


def make(pages: int) -> PagedCache:
    return PagedCache(SHAPES, pages, S, torch.device("cpu"), torch.float32)


def fill(pool: PagedCache, pages: list[int], ids: list[int]) -> None:
    """Keys and values that say which token they are of, behind which tokens, and in which layer."""
    for layer in SHAPES:
        for at in range(len(ids)):
            state = hash(tuple(ids[: at + 1])) % 1_000_003 + layer
            pool.keys[layer][pages[at // S], 0, 0, at % S] = state
            pool.values[layer][pages[at // S], 0, at % S, 0] = state


def read(pool: PagedCache, pages: list[int], count: int) -> list[list[float]]:
    keys = [pool.keys[layer][pages, 0, 0].flatten()[:count].tolist() for layer in SHAPES]
    values = [pool.values[layer][pages, 0, :, 0].flatten()[:count].tolist() for layer in SHAPES]
    assert keys == values
    return keys


def test_the_longest_known_beginning_is_found_with_its_contents():
    """Random prompts over 3 ids, so that many share beginnings; with room for all of them."""
    rng, known, room = random.Random(0), {"a": [], "b": []}, make(400)
    prefixes, pool = PrefixCache(room), make(8)
    for _ in range(120):
        adapter, ids = rng.choice("ab"), [rng.randrange(3) for _ in range(rng.randrange(1, 20))]
        pages, count = prefixes.find(adapter, ids)
        best = max((common_prefix(ids, other) for other in known[adapter]), default=0)
        assert count == min(best, len(ids) - 1) and len(pages) == -(-count // S)
        fill(pool, list(range(8)), ids)
        assert read(room, pages, count) == read(pool, list(range(8)), count)
        prefixes.keep(adapter, ids, pool, list(range(8)))
        known[adapter].append(ids)


def test_the_least_recently_used_make_room():
    prefixes, pool = PrefixCache(make(6)), make(2)
    prompts = [[n] * 8 for n in range(4)]  # two pages each
    for n in (0, 1, 2, 0, 3):  # 0 is used again, so 1 is the oldest when 3 comes
        prefixes.keep("", prompts[n], pool, [0, 1])
        assert len(prefixes.free) + len(prefixes.order) == 6
    assert [prefixes.find("", [*prompts[n], 9])[1] for n in range(4)] == [8, 0, 8, 8]
    prefixes.find("", [*prompts[2], 9])
    prefixes.keep("", [7, 7, 7, 7, 7], pool, [0, 1])  # now 0 is: its last page goes before its first
    assert [prefixes.find("", [*prompts[n], 9])[1] for n in range(4)] == [0, 0, 8, 8]


def test_random_use_keeps_the_tree_whole():
    """What is found is right however often pages were taken over; every page is free or in the tree, once."""
    rng, room = random.Random(1), make(12)
    prefixes, pool = PrefixCache(room), make(8)
    for _ in range(400):
        ids = [rng.randrange(2) for _ in range(rng.randrange(1, 30))]
        pages, count = prefixes.find("", ids)
        fill(pool, list(range(8)), ids)
        assert read(room, pages, count) == read(pool, list(range(8)), count)
        prefixes.keep("", ids, pool, list(range(8)))
        tree = list(nodes(prefixes.roots[""]))
        assert sorted([node.page for node in tree] + prefixes.free) == list(range(12))
        assert set(tree) == set(prefixes.order)


def nodes(node: Node):
    for child in node.children.values():
        yield child
        yield from nodes(child)


def test_a_prompt_larger_than_the_pool_is_not_kept():
    prefixes, pool = PrefixCache(make(2)), make(4)
    prefixes.keep("", list(range(12)), pool, [0, 1, 2])
    assert not prefixes.order and prefixes.find("", list(range(12))) == ([], 0)
    closed = PrefixCache(None)
    closed.keep("", [1, 2, 3], pool, [0])
    assert closed.find("", [1, 2, 3]) == ([], 0)
