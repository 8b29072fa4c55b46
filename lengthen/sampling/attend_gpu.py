"""Attention of a packed batch on a GPU: new keys go to their pages, kernels walk the page tables.

What sampling/attend_cpu.py does by streaming the pool, done by kernels/attention.py: `store_pages`, then for decoding
texts `paged_attention` (one new token each, up to 8 with drafts), and for pieces of prompts FlashAttention over the
keys gathered out of their pages (models/flash.py). Everything that a kernel needs to know lies in int32 tensors on
the device, so a batch that only decodes can be captured in a CUDA graph (lengthen/sampling/graphs.py).

On a CPU the same code runs on the kernels' torch references: slower than streaming, and tested that way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.attention import Pages, paged_attention, read_pool, store_pages
from lengthen.models.flash import Bounds, attend_pieces

# B decoding texts, T packed tokens, Q = the most tokens that one of the texts has in a pass: 1, more with drafts.


@dataclass
class Batch:
    """Who is who in one packed forward pass. The first `decoded` tokens are of decoding texts, then come the pieces.

    A text with fewer than Q tokens repeats its first one in front, and those results are dropped.
    """

    cache: Any  # attention.PagedCache, which stands above this module
    slots: Tensor  # int32 [T] page * S + place in the page, of each token's key and value; -1 = nowhere
    table: Tensor  # int32 [B, W] pages of each decoding text, -1 behind its last
    lengths: Tensor  # int32 [B] keys of each decoding text, its new tokens included
    decoded: int  # packed tokens of decoding texts
    spread: Tensor | None = None  # int64 [B * Q] packed index of each query; None where Q = 1
    gather: Tensor | None = None  # int64 [decoded] where in [B * Q] a packed token is
    bounds: Bounds | None = None  # of the pieces; None = there are none
    earlier: tuple[Tensor, Tensor] | None = None  # int64 pages and places of all keys of the pieces; None = all are new


def attend(
    batch: Batch,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    window: int,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """As attention.attend_packed: q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv] -> [T, Hq, Dv]."""
    cache, n, B = batch.cache, batch.decoded, len(batch.lengths)
    pages = Pages(cache.keys[layer], cache.values[layer], *cache.scales.get(layer, ()))
    store_pages(k, v, pages, batch.slots)
    parts = []
    if n:
        queries = q[:n] if batch.spread is None else q.index_select(0, batch.spread)
        options = {"scale": scaling, "window": window, "softcap": softcap, "sinks": sinks}
        out = paged_attention(queries.unflatten(0, (B, -1)), pages, batch.table, batch.lengths, **options).flatten(0, 1)
        parts.append(out if batch.gather is None else out.index_select(0, batch.gather))
    if batch.bounds:
        if batch.earlier:
            page, place = batch.earlier
            pools = ((pages.keys, pages.key_scales), (pages.values, pages.value_scales))
            k, v = (read_pool(*pool, (page, slice(None), place)).to(q.dtype) for pool in pools)  # [keys, Hkv, D]
        else:
            k, v = k[n:], v[n:]
        parts.append(attend_pieces(q[n:], k, v, batch.bounds, scaling, window, softcap, sinks))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def make_batch(
    cache: Any,
    decode: Sequence[tuple[list[int], int, int]],
    prefill: Sequence[tuple[list[int], int, int]],
) -> Batch:
    """The batch of decoding texts followed by pieces of prompts, each (pages, start, count), in this order.

    A decoding text has its newest token at `start`, and count - 1 drafted ones behind it.
    """
    S, device = cache.page_tokens, cache.device

    def ints(x: list, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(x, dtype=dtype, device=device)

    slots = [
        pages[p // S] * S + p % S for pages, start, count in (*decode, *prefill) for p in range(start, start + count)
    ]
    width = max((len(pages) for pages, _, _ in decode), default=1)
    table = [pages + [-1] * (width - len(pages)) for pages, _, _ in decode]
    Q = max((count for _, _, count in decode), default=1)
    decoded = sum(count for _, _, count in decode)
    lengths = [start + count for _, start, count in decode]
    batch = Batch(cache, ints(slots), ints(table).view(-1, width), ints(lengths), decoded)
    if Q > 1:
        spread, gather, at = [], [], 0
        for row, (_, _, count) in enumerate(decode):
            spread += [at] * (Q - count) + list(range(at, at + count))
            gather += range(row * Q + Q - count, row * Q + Q)
            at += count
        batch.spread, batch.gather = ints(spread, torch.int64), ints(gather, torch.int64)
    if prefill:
        totals = [start + count for _, start, count in prefill]
        batch.bounds = Bounds.make([count for _, _, count in prefill], totals, device)
        # fp8: each token sees its own key rounded, as the text's later tokens will, however the prompt was cut.
        if cache.scales or any(start for _, start, _ in prefill):
            page = [pages[p // S] for (pages, _, _), total in zip(prefill, totals, strict=True) for p in range(total)]
            place = [p % S for total in totals for p in range(total)]
            batch.earlier = ints(page, torch.int64), ints(place, torch.int64)
    return batch
