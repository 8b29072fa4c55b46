"""Attention over streamed pages, on a CPU: the queries go to the pages, and no text's pages are gathered.

    keys, values  [P, Hkv, S, D]

In decoding, every page meets, where it lies, the queries of the text that owns it: torch's flash attention takes the
pages for a batch, streams the pool once, however ragged the texts are, and gives the log of the sum of exponentials of
each page's scores. With that the outputs of a text's pages are joined. For that a page has one owner, and the pages in
use lie close together (sampling/cache.py). Where only a few texts bring drafts, these are a group of their own, whose
pages are gathered: else every page would meet as many queries as the longest draft has.

Prefill chunks attend to their own keys, and to those of the text's earlier chunks, gathered from its pages. So do all
texts of the few models that torch's flash attention does not carry: with softcaps, or other sizes of keys and values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention import Pages
from lengthen.models.flash import dense
from lengthen.sampling.batch import Rule
from lengthen.sampling.pages import Chunk

SUM = 0  # embedding_bag's mode: rows, each by its weight, are added up
UNSEEN = -1e30  # added to a score; finite, so that a page with nothing to see gives numbers, which weigh nothing

# The time of each, in units of reading a page and multiplying it by one token's queries: another token's queries;
# copying the page first. Measured on two cores.
QUERY, COPY = 0.3, 3.0

# B texts, T packed tokens, P pages, S tokens in a page, D head size, Hq query heads, Hkv key heads, G = Hq / Hkv,
# Q = the most tokens that one of the decoding texts has in a pass: 1, more with drafts.


class Text(NamedTuple):
    """The tokens of one text in a packed batch."""

    first: int  # packed index of the first
    tokens: int
    start: int  # position of the first in the text
    pages: list[int]  # of the text, up to its last token here


@dataclass
class Group:
    """Decoding texts with at most Q tokens each, and the pages that they own."""

    lengths: Tensor  # [B] keys that each text's first token sees, itself included
    asker: Tensor  # [P] text whose queries the page meets: its owner; of a page that has none, the last
    owned: Tensor  # [B, N] the pages of each text, its first one again behind its last
    over: Tensor  # [B, 1, N] fp32, added to a page's weight: UNSEEN behind the last
    first: Tensor  # [P] position of the page's first token
    queries: int  # Q
    pages: Tensor | None  # [P] which pages of the pool; None = the first P, where they lie
    spread: Tensor | None  # [B * Q] packed index of each text's tokens, its last repeated; None = there are no others
    gather: Tensor | None  # [n] where in [B * Q] the group's tokens are, in packed order; None = B = n
    packed: Tensor  # [n] their packed index
    _masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _bags: list[Tensor] = field(default_factory=list)

    def mask(self, window: int, page_tokens: int, G: int) -> Tensor:
        """[P, 1, Q * G, S] fp32, G = 1 for Q = 1: 0 where the owner's token may look, else UNSEEN. One for all layers
        of a window."""
        if (window, G) not in self._masks:
            device = self.lengths.device
            seeing = self.lengths[self.asker][:, None] + torch.arange(self.queries, device=device)  # [P, Q]
            length = seeing[..., None]
            key = (self.first[:, None] + torch.arange(page_tokens, device=device))[:, None]  # [P, 1, S]
            seen = key < length
            if window:
                seen &= key >= length - window  # `window` keys, the token itself included
            mask = seen.new_zeros(seen.shape, dtype=torch.float32).masked_fill_(~seen, UNSEEN)
            self._masks[window, G] = mask.repeat_interleave(G if self.queries > 1 else 1, 1)[:, None]
        return self._masks[window, G]

    def bags(self, C: int) -> list[Tensor]:
        """[where each text has its pages' results, for all heads and tokens (B * C * N), where each bag begins], for
        embedding_bag over [P * C]; C = Q * Hq, which is the same for all layers but of odd models."""
        if not self._bags or len(self._bags[1]) != len(self.owned) * C:
            N = self.owned.shape[1]
            where = self.owned[:, None] * C + torch.arange(C, device=self.owned.device)[:, None]  # [B, C, N]
            self._bags = [where.flatten(), torch.arange(0, where.numel(), N, device=where.device)]
        return self._bags


@dataclass
class StreamedBatch:
    """Which packed token belongs to which text, in one forward pass: decoding texts first, then prefill chunks."""

    layers: Mapping[int, Pages]
    page: Tensor  # int64 [T] page that each token's key and value go to
    slot: Tensor  # int64 [T] place inside that page
    decode: list[Text]
    groups: list[Group]  # the same
    prefill: list[Text]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        """As batch.Batch has it."""
        keys, values = self.layers[layer][:2]
        keys[self.page, :, self.slot] = k  # [T, Hkv, D]
        values[self.page, :, self.slot] = v  # [T, Hkv, Dv]
        streamed = rule.softcap is None and k.shape[2] == v.shape[2]
        if streamed and len(self.groups) == 1 and not self.prefill:  # the common case: nothing is put in its place
            return _stream(q, keys, values, self.groups[0], rule)
        out = q.new_empty(*q.shape[:2], v.shape[2])
        for group in self.groups if streamed else ():
            out[group.packed] = _stream(q, keys, values, group, rule)
        for first, count, start, pages in self.prefill if streamed else self.decode + self.prefill:
            here, total = slice(first, first + count), start + count
            if start == 0:
                all_k, all_v = k[here].transpose(0, 1), v[here].transpose(0, 1)
            else:  # the earlier tokens of this text lie in its pages
                all_k, all_v = (x[pages].transpose(0, 1).flatten(1, 2)[:, :total] for x in (keys, values))
            out[here] = dense(q[here].transpose(0, 1), all_k, all_v, start, *rule).transpose(0, 1)
        return out


def _stream(q: Tensor, keys: Tensor, values: Tensor, group: Group, rule: Rule) -> Tensor:
    """A group's tokens against its pages: packed q [., Hq, D] -> [n, Hq, D]. Joined over pages in fp32."""
    P, B, Q, (Hq, D) = len(group.asker), len(group.lengths), group.queries, q.shape[1:]
    Hkv, S = keys.shape[1:3]
    G = Hq // Hkv
    if group.pages is None:
        keys, values = keys[:P], values[:P]
    else:
        keys, values = keys.index_select(0, group.pages), values.index_select(0, group.pages)
    # 1) Every page meets its owner's queries.
    q = q[:B] if group.spread is None else q.index_select(0, group.spread)
    q = q.view(B, Q, Hkv, G, D).transpose(1, 2).reshape(B, -1)  # [B, Hkv * Q * G * D]
    asked = q.index_select(0, group.asker).view(P, Hkv, Q * G, D)
    mask = group.mask(rule.window, S, G)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        asked, keys, values, 0.0, False, attn_mask=mask, scale=rule.scaling
    )
    # 2) Softmax over the pages of a text: a page weighs what its exponentials sum up to. It has C results.
    C = Q * G * Hkv
    where, bags = group.bags(C)
    shares = lse.transpose(1, 2).reshape(-1).index_select(0, where).view(B, C, -1) + group.over  # [B, C, N] fp32
    pages = out.to(lse.dtype).transpose(1, 2).reshape(-1, D)  # [P * C, D]
    weights = shares.softmax(-1).flatten()
    out = torch.embedding_bag(pages, where, bags, False, SUM, False, weights)[0].view(B, Q, G, Hkv, D)
    if rule.sinks is not None:  # they are in the sum, and give nothing
        total = shares.logsumexp(-1).view(B, Q, G, Hkv)
        out = out * torch.sigmoid(total - rule.sinks.float().view(Hkv, G).T)[..., None]
    out = out.transpose(2, 3).reshape(B * Q, Hq, D).to(q.dtype)
    return out if group.gather is None else out.index_select(0, group.gather)


# ---------------------------------------------------------------------------------------------------------
# From block tables to a batch


def make_batch(
    layers: Mapping[int, Pages],
    page_tokens: int,
    device: torch.device,
    decode: Sequence[Chunk],
    prefill: Sequence[Chunk],
) -> StreamedBatch:
    """The batch of decoding texts, each with its newest token and its drafts, followed by prefill chunks."""
    S, first = page_tokens, 0
    texts = []
    for table, start, count in (*decode, *prefill):
        texts.append(Text(first, count, start, table[: -(-(start + count) // S)]))
        first += count
    decoding = texts[: len(decode)]
    single, drafting = ([text for text in decoding if (text.tokens == 1) is one] for one in (True, False))
    pages: list[int] = []
    slots: list[int] = []
    for text in texts:
        places = range(text.start, text.start + text.tokens)
        pages.extend(text.pages[p // S] for p in places)
        slots.extend(p % S for p in places)
    if single and drafting:
        more = QUERY * (max(text.tokens for text in drafting) - 1)
        theirs, others = (sum(len(text.pages) for text in some) for some in (drafting, single))
        if theirs * (COPY + 1 + more) > (theirs + others) * more:  # to gather these pages costs more than it saves
            single, drafting = sorted(single + drafting), []
    alone = not (single and drafting)
    groups = [_group(some, S, device, alone or some is single, alone) for some in (single, drafting) if some]
    page, slot = (torch.tensor(x, dtype=torch.long, device=device) for x in (pages, slots))
    return StreamedBatch(layers, page, slot, decoding, groups, texts[len(decode) :])


def _group(texts: Sequence[Text], page_tokens: int, device: torch.device, in_place: bool, alone: bool) -> Group:
    """in_place: the pages are not gathered. alone: there is no other group."""
    B, Q = len(texts), max(text.tokens for text in texts)
    pages = [page for text in texts for page in text.pages]
    P, N = max(pages) + 1 if in_place else len(pages), max(len(text.pages) for text in texts)
    owner, first, owned = [B - 1] * P, [0] * P, []
    place = iter(pages if in_place else range(P))
    for row, text in enumerate(texts):
        places = [next(place) for _ in text.pages]
        for nth, page in enumerate(places):
            owner[page], first[page] = row, nth * page_tokens
        owned.append(places + places[:1] * (N - len(places)))
    spread = [text.first + min(i, text.tokens - 1) for text in texts for i in range(Q)]
    gather = [row * Q + i for row, text in enumerate(texts) for i in range(text.tokens)]
    packed = [text.first + i for text in texts for i in range(text.tokens)]
    lengths = [text.start + 1 for text in texts]
    made = [torch.tensor(x, device=device) for x in (lengths, owner, first, pages, spread, gather, packed)]
    held = torch.tensor([len(text.pages) for text in texts], device=device)[:, None, None]
    behind = torch.arange(N, device=device) >= held  # [B, 1, N]
    return Group(
        lengths=made[0],
        asker=made[1],
        owned=torch.tensor(owned, device=device),
        over=torch.zeros(behind.shape, device=device).masked_fill_(behind, UNSEEN),
        first=made[2],
        queries=Q,
        pages=None if in_place else made[3],
        spread=None if alone and Q == 1 else made[4],
        gather=None if Q == 1 else made[5],
        packed=made[6],
    )
