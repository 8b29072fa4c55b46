"""Exercise 5, 60 minutes: attention over keys that lie in pages.

The keys and values of a text lie in pages anywhere in a pool; its block table says where. To gather them first would
read and write everything once more. So go through the pages one by one and keep, for each query head, three things:

    top     the largest score so far
    total   the sum of e^(score - top)
    acc     the sum of e^(score - top) * value

When a page brings a larger score, what has been summed is multiplied by e^(old top - new top). At the end the output
is acc / total. Nothing overflows, because no exponent is above 0, and each page is read only once. (The tests see the
result only, not whether you gather.)

1. Write `partial` for any run of pages. Hq query heads share Hkv key heads, G = Hq / Hkv to each: query heads 0 to
   G - 1 read key head 0, the next G read key head 1, and so on. Positions at or after `length` hold no key: what
   is in the page there is undefined, and may be nan.
2. Write `join`: a long text can be divided among several processors, each with some of its pages. How are their
   (acc, top, total) put together? One part may have no key at all: what are its three?

Leads to: kernels/attention.py (the mathematics), `_decode_kernel` and `_join_kernel` in kernels/attention_triton.py.

    python -m pytest -q exercises/05_paged_attention.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import Pages, paged_attention_reference

Part = tuple[Tensor, Tensor, Tensor]  # acc [Hq, D], top [Hq], total [Hq]


def partial(q: Tensor, keys: Tensor, values: Tensor, table: list[int], first: int, length: int, scale: float) -> Part:
    """What a run of pages adds to the attention of one query, q [Hq, D].

    keys, values: [P, Hkv, S, D]. table: the pages of the run, in order. first: the position of the run's first key in
    its text. length: keys of the text; the query is its last token, so it sees all of them.
    """
    raise NotImplementedError


def join(parts: list[Part]) -> Tensor:
    """The attention [Hq, D] over the keys of all parts; at least one of them has a key."""
    raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------

HQ, HKV, D, S = 6, 2, 16, 16


def example(length: int, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """A pool of 12 pages, nan wherever the text has nothing, and its table: pages in no order."""
    generator = torch.Generator().manual_seed(length)
    q = size * torch.randn(HQ, D, generator=generator)
    keys, values = torch.full((12, HKV, S, D), float("nan")), torch.full((12, HKV, S, D), float("nan"))
    table = torch.randperm(12, generator=generator)[: -(-length // S)].tolist()
    for position in range(length):
        for pool in (keys, values):
            pool[table[position // S], :, position % S] = torch.randn(HKV, D, generator=generator)
    return q, keys, values, table


def reference(q: Tensor, keys: Tensor, values: Tensor, table: list[int], length: int) -> Tensor:
    pages, lengths = torch.tensor([table], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    return paged_attention_reference(q[None, None], Pages(keys, values), pages, lengths, scale=D**-0.5)[0, 0]


def test_one_run_is_the_projects_attention():
    for length in (1, 15, 16, 17, 100, 192):
        q, keys, values, table = example(length)
        got = join([partial(q, keys, values, table, 0, length, D**-0.5)])
        torch.testing.assert_close(got, reference(q, keys, values, table, length))


def test_it_is_torchs_attention():
    q, keys, values, table = example(50)
    k, v = (pool[table].transpose(0, 1).flatten(1, 2)[None, :, :50] for pool in (keys, values))
    want = F.scaled_dot_product_attention(q[None, :, None], k, v, enable_gqa=True)[0, :, 0]
    torch.testing.assert_close(join([partial(q, keys, values, table, 0, 50, D**-0.5)]), want)


def test_several_runs_join_to_the_same():
    for length in (33, 100, 192):
        q, keys, values, table = example(length)
        cuts = [0, 1, 1, len(table) // 2, len(table)]  # one of the runs has no page
        runs = [(table[a:b], a * S) for a, b in zip(cuts, cuts[1:], strict=False)]
        parts = [partial(q, keys, values, run, first, length, D**-0.5) for run, first in runs]
        torch.testing.assert_close(join(parts), reference(q, keys, values, table, length))


def test_large_scores_do_not_overflow():
    """Nor do scores that are far below 0 leave 0 / 0."""
    q, keys, values, table = example(100, size=1e4)
    for query, pool in ((q, keys), (q.abs(), -keys.abs())):
        got = join([partial(query, pool, values, table, 0, 100, D**-0.5)])
        torch.testing.assert_close(got, reference(query, pool, values, table, 100))
