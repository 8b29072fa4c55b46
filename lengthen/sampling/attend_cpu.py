"""Attention over keys and values that lie in pages, for any model that calls transformers' attention interface.

The sampler runs a model on *packed* tokens: one sequence [1, T] that holds, one after the other, the newest token
of every running text and pieces of new prompts, with explicit positions, no mask and no Cache object. The one thing
that must know which token belongs to which text is attention, so this module registers its own attention function
(`AttentionInterface.register`) and leaves everything else to the model's unmodified code. A running text may bring
drafted tokens behind its newest one (lengthen/sampling/lookup.py): each sees the pages up to itself.

    keys[layer]    [pages, Hkv, D, S]    transposed: q @ K then needs no transposed operand, which a CPU likes
    values[layer]  [pages, Hkv, S, D]    S = tokens in a page

Decoding does not gather the pages of a text; the queries go to the pages instead. Every page is multiplied, where it
lies, by the query of the text that owns it: two batched products that stream the pool once, however ragged the texts
are. The partial softmaxes are then joined per text. Pages are handed out lowest first and moved together when holes
appear, so that the streamed range stays dense. Where only a few texts bring drafts, these are a group of their own,
whose pages are gathered: else every product has as many queries as the longest draft. That is the way of a CPU. On a
GPU the pages lie as kernels/attention.py wants them, its kernels walk the page tables, and nothing needs to be moved:
lengthen/sampling/attend_gpu.py.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from lengthen.models.flash import dense
from lengthen.records import UserError
from lengthen.sampling import attend_gpu as walk
from lengthen.sampling import cpu_layer as decoder

NAME = "lengthen_paged"  # key in transformers' registry
PLAIN_LAYERS = {"full_attention", "sliding_attention"}  # layer types this module knows how to carry
FP8 = torch.float8_e4m3fn
STABLE = -1e30  # stands for "no key yet" in a running maximum; exp(-inf - STABLE) is 0, not nan
SAFE = 40.0  # scores between -SAFE and SAFE: their exponentials, and sums of them, are far from fp32's limits

# On a CPU, beside reading a page and multiplying it by one token's queries: another token's; copying the page first.
QUERY, COPY = 0.3, 3.0

# B texts, T packed tokens, P pages in use, S tokens in a page, D head size, G query heads per key head, Q = the most
# tokens that one of the decoding texts has in a pass: 1, more with drafts.


@dataclass
class LayerShape:
    """What one layer hands to attention: found by running the model once."""

    heads: int  # key heads
    key_dim: int
    value_dim: int
    window: int  # 0 = sees everything


def walked(device: torch.device) -> bool:
    """Whether kernels walk the page tables (a GPU), or the pool is streamed (a CPU). Tests may say otherwise."""
    return device.type == "cuda"


class PagedCache:
    """The pool of pages: which are free, and the tensors of every layer.

    Memory is `num_pages * page_tokens * bytes_per_token`; on a CPU the system commits it only when touched.
    Where it is `walked`, keys are [pages, Hkv, S, D] as the values are, pages may hold anything before their use, and
    a dtype of float8_e4m3fn halves them: `scales[layer]` are then those of keys and values (kernels/attention.py).
    """

    def __init__(
        self, shapes: dict[int, LayerShape], num_pages: int, page_tokens: int, device: torch.device, dtype: torch.dtype
    ):
        self.num_pages, self.page_tokens, self.device = num_pages, page_tokens, device
        self.walked = walked(device)
        P, S, kind = num_pages, page_tokens, {"device": device, "dtype": dtype}
        sizes = {i: (S, s.key_dim) if self.walked else (s.key_dim, S) for i, s in shapes.items()}
        self.keys = {i: torch.empty(P, s.heads, *sizes[i], **kind) for i, s in shapes.items()}
        self.values = {i: torch.empty(P, s.heads, S, s.value_dim, **kind) for i, s in shapes.items()}
        self.scales: dict[int, tuple[Tensor, Tensor]] = {}
        if dtype == FP8:
            if not self.walked:
                raise UserError("keys and values in fp8 are for a GPU, this is a CPU", "--kv-cache auto")
            for i, s in shapes.items():
                self.scales[i] = tuple(torch.empty(P, s.heads, S, device=device) for _ in range(2))
        self.free = list(range(num_pages))  # a heap: the lowest page is handed out first
        self.holders = [0] * num_pages  # of each page: more than one where it is shared, which a streamed page is not
        # Pages below this hold finite numbers: where all are streamed, a masked nan would still poison a sum.
        self.clean = num_pages if self.walked else 0

    @staticmethod
    def bytes_per_token(shapes: dict[int, LayerShape], dtype: torch.dtype) -> int:
        scales = 2 * torch.float32.itemsize if dtype == FP8 else 0
        return sum(s.heads * ((s.key_dim + s.value_dim) * dtype.itemsize + scales) for s in shapes.values())

    def tensors(self, layer: int) -> list[Tensor]:
        """All that a layer's pages hold, page by page; fp8 as bytes, which is what torch can index."""
        pools = [self.keys[layer], self.values[layer]]
        return [p.view(torch.uint8) for p in pools] + list(self.scales[layer]) if self.scales else pools

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def take(self) -> int:
        page = heapq.heappop(self.free)
        if page >= self.clean:
            end = min(self.num_pages, page + 16)
            for layer in self.keys:
                self.keys[layer][self.clean : end].zero_()
                self.values[layer][self.clean : end].zero_()
            self.clean = end
        self.holders[page] = 1
        return page

    def share(self, pages: Sequence[int]) -> None:
        """One more holds these pages: each is free again when all have given it back."""
        assert self.walked, "a page that is streamed belongs to one text"
        for page in pages:
            self.holders[page] += 1

    def give_back(self, pages: list[int]) -> None:
        for page in pages:
            self.holders[page] -= 1
            if not self.holders[page]:
                heapq.heappush(self.free, page)
        pages.clear()

    def copy(self, source: list[int], target: list[int], of: "PagedCache | None" = None) -> None:
        """Page contents, all layers, from one page to another; `of` is the pool of the source where it is not this."""
        of = of or self
        for layer in self.keys:
            for ours, theirs in zip(self.tensors(layer), of.tensors(layer), strict=True):
                ours[target] = theirs[source]

    def compact(self, tables: Sequence[list[int]]) -> None:
        """Moves pages down when more than an eighth of the streamed range is holes. Edits the page tables in place."""
        used = sorted(page for table in tables for page in table)
        if self.walked or not used or used[-1] + 1 <= len(used) + len(used) // 8 + 1:
            return
        holes = sorted(set(range(len(used))) - set(used))
        high = [page for page in used if page >= len(used)]
        self.copy(high, holes)
        moved = dict(zip(high, holes, strict=True))
        for table in tables:
            table[:] = [moved.get(page, page) for page in table]
        self.free = list(range(len(used), self.num_pages))  # sorted, so a heap
        self.holders = [int(page < len(used)) for page in range(self.num_pages)]


@dataclass
class Piece:
    """Part of a prompt in a packed batch: `count` tokens from packed index `at`, the first of them at `start`."""

    at: int
    count: int
    start: int
    pages: list[int]


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
    at: Tensor  # [n] their packed index
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
                seen &= key >= length - window  # W keys, the token itself included
            self._mask[window] = seen.float()[:, None, :, None]
        return self._mask[window]

    def bias(self, window: int, page_tokens: int) -> Tensor:
        """The same to be added to scores: 0 and -inf."""
        if window not in self._bias:
            self._bias[window] = self.mask(window, page_tokens).log()
        return self._bias[window]

    def joined(self, parts: Tensor) -> Tensor:
        """[P, ...] -> [B, ...]: sums over the pages of a text, in a fixed order on a CPU."""
        sums = parts.new_zeros(len(self.lengths) + 1, parts[0].numel())
        return sums.index_add_(0, self.owner, parts.reshape(len(parts), -1))[:-1]


@dataclass
class Batch:
    """Who is who in one packed forward pass. The first `decoded` tokens are of decoding texts, then come the pieces."""

    cache: PagedCache | None  # None = a probe: attend to the batch itself and note the shapes
    pages: Tensor | None = None  # [T] page each token's key and value go to
    slots: Tensor | None = None  # [T] place inside that page
    decoded: int = 0  # packed tokens of decoding texts: one each, more with drafts
    groups: list[Group] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    shapes: dict[int, LayerShape] = field(default_factory=dict)  # filled by a probe


_batch: Batch | walk.Batch | None = None  # the forward pass in progress


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The registered function. query [1, Hq, T, D], key and value [1, Hkv, T, D] with positions applied.

    Returns ([1, T, Hq, D], None). `sliding_window`, `softcap` (tanh bound of the scores) and `s_aux` (a learned
    sink per query head) come from the model, layer by layer. The mask is ignored: none is built for our key.
    """
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)  # [T, H, D]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend_packed(module.layer_idx, q, k, v, scaling, sliding_window or 0, softcap, s_aux)[None], None


def attend_packed(
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    window: int,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The same on packed tokens: q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv] -> [T, Hq, Dv]. window 0 = none."""
    assert _batch is not None, "a model with lengthen's attention was called outside of the sampler"
    batch = _batch
    if batch.cache is None:
        batch.shapes[layer] = LayerShape(k.shape[1], k.shape[2], v.shape[2], window)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return dense(q, k, v, 0, scaling, window, softcap, sinks).transpose(0, 1)

    if batch.cache.walked:
        return walk.attend(batch, layer, q, k, v, scaling, window, softcap, sinks)
    keys, values = batch.cache.keys[layer], batch.cache.values[layer]
    keys[batch.pages, :, :, batch.slots] = k
    values[batch.pages, :, batch.slots] = v
    options = (scaling, window, softcap, sinks)
    if len(batch.groups) == 1 and not batch.pieces:
        return _decode(q, keys, values, batch.groups[0], *options)
    out = q.new_empty(*q.shape[:2], v.shape[2])
    for group in batch.groups:
        out[group.at] = _decode(q[: batch.decoded], keys, values, group, *options)
    for piece in batch.pieces:
        here = slice(piece.at, piece.at + piece.count)
        if piece.start == 0:
            all_k, all_v = k[here].transpose(0, 1), v[here].transpose(0, 1)
        else:  # the earlier part of this text lies in its pages
            total = piece.start + piece.count
            all_k = keys[piece.pages].permute(1, 0, 3, 2).flatten(1, 2)[:, :total]
            all_v = values[piece.pages].transpose(0, 1).flatten(1, 2)[:, :total]
        some = q[here].transpose(0, 1)
        out[here] = dense(some, all_k, all_v, piece.start, *options).transpose(0, 1)
    return out


def _decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    group: Group,
    scaling: float,
    window: int,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """A group's tokens against its pages: packed q [., Hq, D] -> [n, Hq, Dv]. Softmax in fp32, joined over pages."""
    P, B, Q, (Hq, D) = len(group.owner), len(group.lengths), group.queries, q.shape[1:]
    Hkv, S, Dv = keys.shape[1], keys.shape[3], values.shape[3]
    G, owner = Hq // Hkv, group.owner
    if group.pages is None:
        keys, values = keys[:P], values[:P]
    else:
        keys, values = keys.index_select(0, group.pages), values.index_select(0, group.pages)
    # 1) every page meets its owner's queries. Unowned pages get the last text's, and are masked.
    if group.spread is not None:
        q = q.index_select(0, group.spread)
    q = q.view(B, Q, Hkv, G, D).transpose(1, 2)
    mine = (q * scaling).reshape(B, -1).index_select(0, group.asker).view(P * Hkv, Q * G, D)
    scores = torch.bmm(mine, keys.view(P * Hkv, D, S)).float()
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
    if sinks is not None:
        total += (sinks.float().view(1, Hkv, 1, G) - highest[:B]).exp()
    part = torch.bmm(terms.to(values.dtype).view(P * Hkv, Q * G, S), values.view(P * Hkv, S, Dv))
    out = group.joined(part.float().view(P, -1)).view(B, Hkv, Q, G, Dv) / total[..., None]
    if group.gather is not None:
        out = out.transpose(1, 2).reshape(B * Q, Hq, Dv).index_select(0, group.gather)
    return out.view(-1, Hq, Dv).to(q.dtype)


# ---------------------------------------------------------------------------------------------------------
# Joining a model


AttentionInterface.register(NAME, attend)


class Hook:
    """Sends a model's attention here while a batch is running, and nowhere else.

    Raises UserError for a model whose attention cannot be carried: it would be silently wrong.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.lent: list[tuple[nn.Module, Callable]] = []  # forwards that replace modules' own while a batch runs
        configs = [model.config, *(m.config for m in model.modules() if hasattr(m, "config"))]
        self.configs = list({id(c): c for c in configs if hasattr(c, "_attn_implementation")}.values())
        self.shapes = self._probe()

    @contextmanager
    def running(self, batch: Batch | walk.Batch) -> Iterator[None]:
        global _batch
        assert _batch is None, "one forward pass at a time"
        before = [c._attn_implementation for c in self.configs]
        for config in self.configs:
            config._attn_implementation = NAME
        _batch = batch
        for module, forward in self.lent:
            module.forward = forward
        try:
            yield
        finally:
            _batch = None
            for module, _ in self.lent:
                del module.forward
            for config, name in zip(self.configs, before, strict=True):
                config._attn_implementation = name

    def refresh(self) -> None:
        """Behind a change of the weights: what was copied of them is copied again."""
        if self.lent:
            windows = {i: shape.window for i, shape in self.shapes.items()}
            self.lent = decoder.forwards(self.model, attend_packed, windows)

    def forward(
        self, batch: Batch | walk.Batch, ids: Tensor, positions: Tensor, keep: Tensor, hidden: bool = False
    ) -> Tensor:
        """ids, positions [T], keep [n] packed indices -> logits [n, V] of those tokens, in the model's dtype.

        hidden: what the head would be given instead, [n, H].
        """
        with self.running(batch):
            if hidden:
                out = self.model.get_decoder()(input_ids=ids[None], position_ids=positions[None], use_cache=False)
                return out.last_hidden_state[0].index_select(0, keep)
            return self.model(
                input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=keep
            ).logits[0]

    def _refuse(self, why: str) -> None:
        name = f"{type(self.model).__name__} (model_type {self.model.config.model_type!r})"
        raise UserError(
            f"the sampler cannot run {name}: {why}",
            "take a model whose layers are all softmax attention: the Llama, Qwen2.5, Qwen3, Mistral, Gemma families",
        )

    @torch.no_grad()
    def _probe(self) -> dict[int, LayerShape]:
        """Runs 8 tokens: by the model's own attention, by ours, and split over the pages. All three must agree."""
        config = self.model.config.get_text_config()
        strange = sorted(set(getattr(config, "layer_types", None) or ()) - PLAIN_LAYERS)
        if strange:
            self._refuse(f"it has {', '.join(strange)} layers")
        if not getattr(self.model, "_supports_attention_backend", False):
            self._refuse("its attention does not go through transformers' attention interface")
        device, dtype = (getattr(self.model.get_input_embeddings().weight, x) for x in ("device", "dtype"))
        ids = (torch.arange(8, device=device) * 7919 + 11) % config.vocab_size
        at, every = torch.arange(8, device=device), torch.arange(8, device=device)
        own = self.model(input_ids=ids[None], use_cache=False).logits[0]
        batch = Batch(None)
        ours = self.forward(batch, ids, at, every)
        if len(batch.shapes) != config.num_hidden_layers:
            self._refuse(f"{config.num_hidden_layers - len(batch.shapes)} of its layers are no attention layers")
        kinds = getattr(config, "layer_types", None) or []
        for layer, kind in enumerate(kinds):
            if kind == "sliding_attention" and not batch.shapes[layer].window:
                self._refuse(f"layer {layer} slides, but its window is not passed to the attention function")
        bound = {torch.float32: 1e-3, torch.float64: 1e-6}.get(dtype, 8e-2) * own.float().abs().max().clamp(min=1)

        def check(what: str, got: Tensor) -> str:
            error = (got.float() - own.float()).abs().max()
            why = f"the logits of {what} differ from the model's own by {error:.2g} (bound {bound:.2g})"
            return "" if error <= bound else why

        def split() -> Tensor:
            cache = PagedCache(batch.shapes, 3, 16 if walked(device) else 4, device, dtype)
            pages = [cache.take(), cache.take(), cache.take()]
            parts = [self.forward(piece_batch(cache, pages, 0, 5), ids[:5], at[:5], every[:5])]
            for i in range(5, 8):
                parts.append(self.forward(token_batch(cache, [pages], [i]), ids[i : i + 1], at[i : i + 1], every[:1]))
            return torch.cat(parts)

        if why := check("a packed pass", ours):
            self._refuse(why)
        self.lent = decoder.forwards(self.model, attend_packed, {i: shape.window for i, shape in batch.shapes.items()})
        why = check("a pass split over pages", split())
        if why and self.lent:  # a model of a known kind that is not quite that: its own code serves it
            self.lent = []
            why = check("a pass split over pages", split())
        if why:
            self._refuse(why)
        return batch.shapes


def token_batch(cache: PagedCache, tables: Sequence[list[int]], positions: Sequence[int]) -> Batch:
    """A batch that decodes one token per text: the token at positions[i] of the text with page table tables[i]."""
    return make_batch(cache, [(table, position, 1) for table, position in zip(tables, positions, strict=True)], [])


def piece_batch(cache: PagedCache, pages: list[int], start: int, count: int) -> Batch:
    """A batch of `count` tokens of one text, from position `start`."""
    return make_batch(cache, [], [(pages, start, count)])


def make_batch(
    cache: PagedCache, decode: Sequence[tuple[list[int], int, int]], prefill: Sequence[tuple[list[int], int, int]]
) -> Batch | walk.Batch:
    """The batch of decoding texts followed by pieces of prompts, each (pages, start, count), in this order.

    A decoding text has its newest token at `start`, and count - 1 drafted ones behind it.
    """
    if cache.walked:
        return walk.make_batch(cache, decode, prefill)
    S, device, pages, slots, at, pieces = cache.page_tokens, cache.device, [], [], 0, []
    plain, drafting = [], []
    for table, start, count in decode:
        (plain if count == 1 else drafting).append((at, table, start, count))
        at += count
    decoded = at
    for table, start, count in prefill:
        pieces.append(Piece(at, count, start, table[: cache.pages_for(start + count)]))
        at += count
    for table, start, count in (*decode, *prefill):
        pages.extend(table[p // S] for p in range(start, start + count))
        slots.extend(p % S for p in range(start, start + count))
    if plain and drafting:
        more = QUERY * (max(count for _, _, _, count in drafting) - 1)
        theirs, others = (sum(len(table) for _, table, *_ in texts) for texts in (drafting, plain))
        if theirs * (COPY + 1 + more) > (theirs + others) * more:  # to gather these pages costs more than it saves
            plain, drafting = sorted(plain + drafting), []
    alone = not (plain and drafting)
    groups = [_group(cache, texts, alone or texts is plain, alone) for texts in (plain, drafting) if texts]
    pages, slots = (torch.tensor(x, dtype=torch.long, device=device) for x in (pages, slots))
    return Batch(cache, pages, slots, decoded, groups, pieces)


def _group(cache: PagedCache, texts: Sequence[tuple[int, list[int], int, int]], in_place: bool, alone: bool) -> Group:
    """The group of decoding texts, each (packed index, pages, start, count). in_place: its pages are not gathered."""
    B, Q = len(texts), max(count for _, _, _, count in texts)
    mine = [(page, row, nth) for row, (_, table, _, _) in enumerate(texts) for nth, page in enumerate(table)]
    pages = [page for page, _, _ in mine]
    P = max(pages) + 1 if in_place else len(pages)
    owner, first = [B] * P, [0] * P
    for place, (page, row, nth) in enumerate(mine):
        place = page if in_place else place
        owner[place], first[place] = row, nth * cache.page_tokens
    spread = [at + min(i, count - 1) for at, _, _, count in texts for i in range(Q)]
    gather = [row * Q + i for row, (_, _, _, count) in enumerate(texts) for i in range(count)]
    every = [at + i for at, _, _, count in texts for i in range(count)]
    lengths = [start + 1 for _, _, start, _ in texts]
    made = [torch.tensor(x, device=cache.device) for x in (lengths, owner, first, pages, spread, gather, every)]
    return Group(
        lengths=made[0],
        owner=made[1],
        asker=made[1].clamp(max=B - 1),
        first=made[2],
        queries=Q,
        pages=None if in_place else made[3],
        spread=None if alone and Q == 1 else made[4],
        gather=None if Q == 1 else made[5],
        at=made[6],
    )
