"""Attention through block tables: new keys go to their pages, kernels read the pages where they lie.

kernels/attention.py does the work: `store_pages`, then for decoding texts `paged_attention` (one new token each, up to
8 with drafts), and for prefill chunks FlashAttention over the keys gathered out of their pages (models/flash.py).
Everything that a kernel needs to know lies in int32 tensors on the device, so a batch that only decodes can be captured
in a CUDA graph (sampling/graphs.py). There every text has as many queries as the one with the most drafts; on a CPU,
where a query costs time, each has its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.attention import Pages, Turn, paged_attention, place, read_pool, store_pages
from lengthen.models.flash import Bounds, attend_chunks
from lengthen.models.upload import upload
from lengthen.sampling.batch import Rule
from lengthen.sampling.pages import Chunk

# B decoding texts, T packed tokens, S tokens in a page, D head size, Hq query heads, Hkv key heads,
# Q = the most tokens that one of the texts has in a pass: 1, more with drafts.
QUERIES = (1, 2, 4, 8)  # Q is rounded up to one of these: each has kernels, and graphs, of its own


@dataclass
class TableBatch:
    """Which packed token belongs to which text, in one forward pass: decoding texts first, then prefill chunks.

    On a GPU a text with fewer than Q tokens repeats its first one in front, and those results are dropped.
    """

    layers: Mapping[int, Pages]
    slots: Tensor  # int32 [T] page * S + place in the page, of each token's key and value; -1 = nowhere
    table: Tensor  # int32 [B, W] pages of each decoding text, -1 after its last
    lengths: Tensor  # int32 [B] keys of each decoding text, its new tokens included
    decode_tokens: int  # packed tokens of decoding texts
    counts: Tensor | None = None  # int32 [B] tokens of each decoding text, on a CPU
    spread: Tensor | None = None  # int64 [B * Q] packed index of each query; None where Q = 1
    gather: Tensor | None = None  # int64 [decode_tokens] where in [B * Q] a packed token is
    bounds: Bounds | None = None  # of the prefill chunks; None = there are none
    stored: tuple[Tensor, Tensor] | None = None  # int64 pages and slots of all their keys; None = all are new

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        """As batch.Batch has it."""
        store_pages(k, v, self.layers[layer], self.slots, check=False)  # first: a token sees its own key
        return self._attend(layer, q, k, v, rule)

    def turn_and_attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule, turn: Turn) -> Tensor:
        """The same of q and k without norms and positions, which they get here, in place."""
        place(q, k, v, self.layers[layer], self.slots, turn, check=False)
        return self._attend(layer, q, k, v, rule)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        n, pages, (scaling, window, softcap, sinks) = self.decode_tokens, self.layers[layer], rule
        results = []  # decoding texts, then prefill chunks: packed order
        if n:
            queries = q[:n] if self.spread is None else q.index_select(0, self.spread)
            if self.counts is None:
                queries = queries.unflatten(0, (len(self.lengths), -1))  # [B, Q, Hq, D]
            options: dict[str, Any] = {"scale": scaling, "window": window, "softcap": softcap, "sinks": sinks}
            options |= {"counts": self.counts, "check": False}
            out = paged_attention(queries, pages, self.table, self.lengths, **options)
            out = out if self.counts is not None else out.flatten(0, 1)
            results.append(out if self.gather is None else out.index_select(0, self.gather))
        if self.bounds:
            if self.stored:
                page, slot = self.stored
                pools = ((pages.keys, pages.key_scales), (pages.values, pages.value_scales))
                k, v = (read_pool(*pool, (page, slice(None), slot)).to(q.dtype) for pool in pools)  # [keys, Hkv, D]
            else:
                k, v = k[n:], v[n:]  # [Tk, Hkv, D]: whole prompts, all keys are in this batch
            results.append(attend_chunks(q[n:], k, v, self.bounds, *rule))
        return results[0] if len(results) == 1 else torch.cat(results)


def make_batch(
    layers: Mapping[int, Pages],
    page_tokens: int,
    device: torch.device,
    decode: Sequence[Chunk],
    prefill: Sequence[Chunk],
    padded: bool,
) -> TableBatch:
    """The batch of decoding texts, each with its newest token and its drafts, followed by prefill chunks.

    padded: all decoding texts have as many queries.
    """
    S = page_tokens

    def ints(x: list, dtype: torch.dtype = torch.int32) -> Tensor:
        return upload(x, dtype, device)

    slots = [
        pages[p // S] * S + p % S for pages, start, count in (*decode, *prefill) for p in range(start, start + count)
    ]
    width = max((len(pages) for pages, _, _ in decode), default=1)
    table = [pages + [-1] * (width - len(pages)) for pages, _, _ in decode]  # [B, W]
    longest = max((count for _, _, count in decode), default=1)
    Q = next(n for n in QUERIES if n >= longest)
    lengths = [start + count for _, start, count in decode]  # the new tokens included
    decode_tokens = sum(count for _, _, count in decode)
    batch = TableBatch(layers, ints(slots), ints(table).view(-1, width), ints(lengths), decode_tokens)
    if not padded:
        batch.counts = ints([count for _, _, count in decode])
    elif Q > 1:
        spread: list[int] = []
        gather: list[int] = []
        end = 0
        for row, (_, _, count) in enumerate(decode):
            spread += [end] * (Q - count) + list(range(end, end + count))  # the kernel has the newest last
            gather += range(row * Q + Q - count, row * Q + Q)
            end += count
        batch.spread, batch.gather = ints(spread, torch.int64), ints(gather, torch.int64)
    if prefill:
        totals = [start + count for _, start, count in prefill]
        batch.bounds = Bounds.make([count for _, _, count in prefill], totals, device)
        # fp8: each token sees its own key rounded, as the text's later tokens will, however the prompt was cut.
        fp8 = next(iter(layers.values())).key_scales is not None
        if fp8 or any(start for _, start, _ in prefill):
            page = [pages[p // S] for (pages, _, _), total in zip(prefill, totals, strict=True) for p in range(total)]
            slot = [p % S for total in totals for p in range(total)]
            batch.stored = ints(page, torch.int64), ints(slot, torch.int64)
    return batch
