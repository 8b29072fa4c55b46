"""Attention over streamed pages, on a CPU: the queries go to the pages, and no text's pages are gathered.

    keys    [P, Hkv, D, S]    transposed: q @ K then needs no transposed operand, which a CPU likes
    values  [P, Hkv, S, D]

In decoding, every page is multiplied, where it lies, by the queries of the text that owns it: two batched products that
stream the pool once, however ragged the texts are. The partial softmaxes are then joined per text. For that a page has
one owner, and the pages in use lie close together (sampling/cache.py). Where only a few texts bring drafts, these are a
group of their own, whose pages are gathered: else every product had as many queries as the longest draft.

Prefill chunks attend to their own keys, and to those of the text's earlier chunks, gathered from its pages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import Pages
from lengthen.models.flash import dense
from lengthen.sampling.batch import Rule
from lengthen.sampling.pages import Chunk

STABLE = -1e30  # stands for "no key yet" in a running maximum; exp(-inf - STABLE) is 0, not nan
SAFE = 40.0  # scores between -SAFE and SAFE: their exponentials, and sums of them, are far from fp32's limits

# The time of each, in units of reading a page and multiplying it by one token's queries: another token's queries;
# copying the page first. Measured on two cores.
QUERY, COPY = 0.3, 3.0

# B texts, T packed tokens, P pages, S tokens in a page, D head size, Hq query heads, Hkv key heads, G = Hq / Hkv,
# Q = the most tokens that one of the decoding texts has in a pass: 1, more with drafts.


@dataclass
class Prefill:
    """A chunk of a prompt in a packed batch."""

    first: int  # packed index of its first token
    count: int
    start: int  # position of that token in its text
    pages: list[int]  # of the text, up to the chunk's end


@dataclass
class Group:
    """Decoding texts with at most Q tokens each, and the pages that they own."""

    lengths: Tensor  # [B] keys that each text's first token sees, itself included
    owner: Tensor  # [P] text that owns the page; B = none
    asker: Tensor  # [P] the same, with the last text for none
    first: Tensor  # [P] position of the page's first token
    queries: int  # Q
    pages: Tensor | None  # [P] which pages of the pool; None = the first P, where they lie
    spread: Tensor | None  # [B * Q] packed index of each text's tokens, its last repeated; None = there are no others
    gather: Tensor | None  # [n] where in [B * Q] the group's tokens are, in packed order; None = B = n
    packed: Tensor  # [n] their packed index
    _mask: dict[int, Tensor] = field(default_factory=dict)
    _bias: dict[int, Tensor] = field(default_factory=dict)

    def mask(self, window: int, page_tokens: int) -> Tensor:
        """[P, 1, Q, 1, S] fp32: 1 where the owner's token may look, 0 elsewhere. One for all layers of a window."""
        if window not in self._mask:
            device = self.lengths.device
            length = F.pad(self.lengths, (0, 1), value=-self.queries)  # <= 0 = owned by none, sees nothing
            length = (length[self.owner][:, None] + torch.arange(self.queries, device=device))[..., None]  # [P, Q, 1]
            key = (self.first[:, None] + torch.arange(page_tokens, device=device))[:, None]  # [P, 1, S]
            seen = key < length
            if window:
                seen &= key >= length - window  # `window` keys, the token itself included
            self._mask[window] = seen.float()[:, None, :, None]
        return self._mask[window]

    def bias(self, window: int, page_tokens: int) -> Tensor:
        """The same to be added to scores: 0 and -inf."""
        if window not in self._bias:
            self._bias[window] = self.mask(window, page_tokens).log()
        return self._bias[window]

    def joined(self, partial: Tensor) -> Tensor:
        """[P, ...] -> [B, ...]: sums over the pages of a text, in a fixed order on a CPU."""
        sums = partial.new_zeros(len(self.lengths) + 1, partial[0].numel())
        return sums.index_add_(0, self.owner, partial.reshape(len(partial), -1))[:-1]


@dataclass
class StreamedBatch:
    """Which packed token belongs to which text, in one forward pass: decoding texts first, then prefill chunks."""

    layers: Mapping[int, Pages]
    page: Tensor  # int64 [T] page that each token's key and value go to
    slot: Tensor  # int64 [T] place inside that page
    decode_tokens: int  # packed tokens of decoding texts: one each, more with drafts
    groups: list[Group]
    prefill: list[Prefill]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        """As batch.Batch has it."""
        keys, values = self.layers[layer][:2]
        keys[self.page, :, :, self.slot] = k  # [T, Hkv, D]
        values[self.page, :, self.slot] = v  # [T, Hkv, Dv]
        if len(self.groups) == 1 and not self.prefill:  # the common case: no result has to be put in its place
            return _decode(q, keys, values, self.groups[0], rule)
        out = q.new_empty(*q.shape[:2], v.shape[2])
        for group in self.groups:
            out[group.packed] = _decode(q[: self.decode_tokens], keys, values, group, rule)
        for chunk in self.prefill:
            here = slice(chunk.first, chunk.first + chunk.count)
            if chunk.start == 0:
                all_k, all_v = k[here].transpose(0, 1), v[here].transpose(0, 1)
            else:  # the earlier chunks of this text lie in its pages
                total = chunk.start + chunk.count
                all_k = keys[chunk.pages].permute(1, 0, 3, 2).flatten(1, 2)[:, :total]  # [Hkv, total, D]
                all_v = values[chunk.pages].transpose(0, 1).flatten(1, 2)[:, :total]
            out[here] = dense(q[here].transpose(0, 1), all_k, all_v, chunk.start, *rule).transpose(0, 1)
        return out


def _decode(q: Tensor, keys: Tensor, values: Tensor, group: Group, rule: Rule) -> Tensor:
    """A group's tokens against its pages: packed q [., Hq, D] -> [n, Hq, Dv]. Softmax in fp32, joined over pages."""
    P, B, Q, (Hq, D) = len(group.owner), len(group.lengths), group.queries, q.shape[1:]
    Hkv, S, Dv = keys.shape[1], keys.shape[3], values.shape[3]
    G, owner, (scaling, window, softcap, sinks) = Hq // Hkv, group.owner, rule
    if group.pages is None:
        keys, values = keys[:P], values[:P]
    else:
        keys, values = keys.index_select(0, group.pages), values.index_select(0, group.pages)
    # 1) every page meets its owner's queries. Unowned pages get the last text's, and are masked.
    if group.spread is not None:
        q = q.index_select(0, group.spread)
    q = q.view(B, Q, Hkv, G, D).transpose(1, 2)  # [B, Hkv, Q, G, D]
    asked = (q * scaling).reshape(B, -1).index_select(0, group.asker).view(P * Hkv, Q * G, D)
    scores = torch.bmm(asked, keys.view(P * Hkv, D, S)).float()
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    highest = None
    if scores.device.type == "cpu" and sinks is None and max(map(abs, map(float, scores.aminmax()))) < SAFE:
        # 2a) no exponential can overflow or vanish: the softmax needs no maximum taken out
        terms = scores.exp_().view(P, Hkv, Q, G, S).mul_(group.mask(window, S))
    else:
        # 2b) the softmax's maximum per token, then its terms
        scores = scores.view(P, Hkv, Q, G, S) + group.bias(window, S)
        highest = scores.new_full((B + 1, Hkv, Q, G), STABLE)
        highest.scatter_reduce_(0, owner[:, None, None, None].expand(P, Hkv, Q, G), scores.amax(-1), "amax")
        if sinks is not None:
            highest = torch.maximum(highest, sinks.float().view(1, Hkv, 1, G))
        terms = scores.sub_(highest[owner][..., None]).exp_()  # [P, Hkv, Q, G, S]
    # 3) sums over the pages of a text
    total = group.joined(terms.sum(-1)).view(B, Hkv, Q, G)
    if sinks is not None and highest is not None:
        total += (sinks.float().view(1, Hkv, 1, G) - highest[:B]).exp()
    partial = torch.bmm(terms.to(values.dtype).view(P * Hkv, Q * G, S), values.view(P * Hkv, S, Dv))
    out = group.joined(partial.float().view(P, -1)).view(B, Hkv, Q, G, Dv) / total[..., None]
    if group.gather is not None:
        out = out.transpose(1, 2).reshape(B * Q, Hq, Dv).index_select(0, group.gather)
    return out.view(-1, Hq, Dv).to(q.dtype)


# ---------------------------------------------------------------------------------------------------------
# From block tables to a batch

Text = tuple[int, list[int], int, int]  # packed index of its first token, block table, position of that token, tokens


def make_batch(
    layers: Mapping[int, Pages],
    page_tokens: int,
    device: torch.device,
    decode: Sequence[Chunk],
    prefill: Sequence[Chunk],
) -> StreamedBatch:
    """The batch of decoding texts, each with its newest token and its drafts, followed by prefill chunks."""
    S, end = page_tokens, 0
    single: list[Text] = []
    drafting: list[Text] = []
    chunks = []
    for table, start, count in decode:
        (single if count == 1 else drafting).append((end, table, start, count))
        end += count
    decode_tokens = end
    for table, start, count in prefill:
        chunks.append(Prefill(end, count, start, table[: -(-(start + count) // S)]))
        end += count
    pages: list[int] = []
    slots: list[int] = []
    for table, start, count in (*decode, *prefill):
        pages.extend(table[p // S] for p in range(start, start + count))
        slots.extend(p % S for p in range(start, start + count))
    if single and drafting:
        more = QUERY * (max(count for *_, count in drafting) - 1)
        theirs, others = (sum(len(table) for _, table, *_ in texts) for texts in (drafting, single))
        if theirs * (COPY + 1 + more) > (theirs + others) * more:  # to gather these pages costs more than it saves
            single, drafting = sorted(single + drafting), []
    alone = not (single and drafting)
    groups = [_group(texts, S, device, alone or texts is single, alone) for texts in (single, drafting) if texts]
    page, slot = (torch.tensor(x, dtype=torch.long, device=device) for x in (pages, slots))
    return StreamedBatch(layers, page, slot, decode_tokens, groups, chunks)


def _group(texts: Sequence[Text], page_tokens: int, device: torch.device, in_place: bool, alone: bool) -> Group:
    """in_place: the pages are not gathered. alone: there is no other group."""
    B, Q = len(texts), max(count for *_, count in texts)
    owned = [(page, row, nth) for row, (_, table, *_) in enumerate(texts) for nth, page in enumerate(table)]
    pages = [page for page, _, _ in owned]
    P = max(pages) + 1 if in_place else len(pages)
    owner, first = [B] * P, [0] * P
    for i, (page, row, nth) in enumerate(owned):
        i = page if in_place else i
        owner[i], first[i] = row, nth * page_tokens
    spread = [at + min(i, count - 1) for at, _, _, count in texts for i in range(Q)]
    gather = [row * Q + i for row, (*_, count) in enumerate(texts) for i in range(count)]
    packed = [at + i for at, _, _, count in texts for i in range(count)]
    lengths = [start + 1 for _, _, start, _ in texts]
    made = [torch.tensor(x, device=device) for x in (lengths, owner, first, pages, spread, gather, packed)]
    return Group(
        lengths=made[0],
        owner=made[1],
        asker=made[1].clamp(max=B - 1),
        first=made[2],
        queries=Q,
        pages=None if in_place else made[3],
        spread=None if alone and Q == 1 else made[4],
        gather=None if Q == 1 else made[5],
        packed=made[6],
    )
