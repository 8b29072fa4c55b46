"""Which tokens the next forward pass computes. No torch here: any engine that draws tokens can be driven by it.

    while step := scheduler.schedule():   # rows and how many tokens of each
        ...                               # forward pass, a drawn token for each of step.draws()
        step.mark_computed()
        scheduler.accept(row, tokens, end_of)   # for each row that drew

1. Continuous batching: a step is one token of every row that decodes, then chunks of new prompts up to a token budget.
   A finished text's place is taken in the next step. There is no padding.
2. Waiting requests start with the longest expected one, so that no long text is left alone at the end; before them
   come those that follow another (what they share is still in the prefix cache), and preempted ones before all. They
   are admitted by the length they are expected to reach, not by the longest they may reach.
3. When the pages run out all the same, the youngest row is preempted: it gives its pages back, keeps its tokens, and is
   computed again later. The oldest row never is, so there is always progress.
4. A prompt that begins like one that ran attaches to its pages (sampling/prefix_cache.py).
5. Rows that copy get draft tokens (sampling/lookup.py), which are accepted up to the first mismatch with a draw.
6. After an out-of-memory error, prefill chunks become smaller, then the rows fewer.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from lengthen.sampling.lookup import LONGEST, DraftCosts, Lookup, allot
from lengthen.sampling.pages import PagePool
from lengthen.sampling.prefix_cache import PrefixCache, common_prefix
from lengthen.sampling.request import Request

SHARED = 8  # tokens; a shorter common prefix is not worth copying
WORTH_WAITING = 32  # tokens; a step is worth waiting for when so many more can then be attached
LEAST_CHUNK = 256  # prompt tokens in a step; never fewer, however short the memory
RECENT = 32  # texts that the running means look back on

End = TypeVar("End")


@dataclass(eq=False)
class Row:
    """A text in progress: what its pages hold, and what the next draw needs."""

    request: Request
    order: int  # in which the requests came
    ids: list[int]  # prompt and output so far
    limit: int  # length of ids at which the context or max_new_tokens ends it
    stop_ids: set[int]  # stop strings that are single special tokens: their text is never decoded
    stop_texts: list[str]
    distinct: set[int]  # ids that the repetition penalty applies to
    unwritten: list[int] = field(default_factory=list)  # the newest of them, which the penalty table still lacks
    pages: list[int] = field(default_factory=list)  # the block table
    computed: int = 0  # tokens whose keys and values are in the pages
    slot: int = -1  # line of the penalty table and of a graph's buffers; -1 = it is not running
    draft: list[int] = field(default_factory=list)  # guessed tokens that the step in progress computes too
    lookup: Lookup | None = None

    @classmethod
    def of(cls, request: Request, order: int, context: int, special: Mapping[str, int]) -> "Row":
        """Before its first token. context: most tokens of a text. special: ids of special tokens by their text."""
        prompt, sampling = request.prompt_ids, request.sampling
        return cls(
            request,
            order,
            list(prompt),
            limit=min(context, len(prompt) + sampling.max_new_tokens),
            stop_ids={special[s] for s in sampling.stop if s in special},
            stop_texts=[s for s in sampling.stop if s not in special],
            distinct=set(prompt[request.penalty_from :]),
        )

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def written(self) -> int:
        """Tokens of the output so far."""
        return len(self.ids) - len(self.request.prompt_ids)

    @property
    def output(self) -> list[int]:
        return self.ids[self.prompt_tokens :]


@dataclass
class Step:
    """What one forward pass computes, packed in this order: (row, tokens from row.computed on, drafts included)."""

    decode: list[tuple[Row, int]]  # one token and its drafts; also the last single token of a prompt
    prefill: list[tuple[Row, int]]  # chunks of prompts, or of preempted texts

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)

    @property
    def work(self) -> list[tuple[Row, int]]:
        return self.decode + self.prefill

    @property
    def decodes_newest(self) -> bool:
        """Whether there are rows that decode, and each computes its newest token, and drafts of it."""
        return bool(self.decode) and all(row.computed + 1 == len(row.ids) for row, _ in self.decode)

    def draws(self) -> tuple[list[tuple[Row, int]], list[int]]:
        """(row, drafts before it) of each token to be drawn, row by row, and the packed index of its logits.

        A row draws when nothing of it is left to compute: once after its newest token, and once after each draft.
        """
        draws: list[tuple[Row, int]] = []
        keep: list[int] = []
        end = 0
        for row, count in self.work:
            end += count  # packed index after the row
            if row.computed + count >= len(row.ids):
                drafts = len(row.draft)
                draws += [(row, i) for i in range(drafts + 1)]
                keep += range(end - drafts - 1, end)
        return draws, keep

    def mark_computed(self) -> None:
        for row, count in self.work:
            row.computed += count


class Waiting(NamedTuple):
    """An entry of the queue: compared from the left, and `order` is unique."""

    kind: int  # 0 = a preempted row, which goes first; 1 = a request that follows another; 2 = a new one
    rank: int  # minus the expected tokens: the longest first
    order: int
    waiting: Request | Row


class Lengths:
    """What finished texts say about how long the others will become."""

    def __init__(self) -> None:
        self.finished = 0
        self.mean_output = 256.0  # tokens; a running mean
        self.mean_excess = 1.0  # running mean of a text's length over what was expected of it

    def learn(self, request: Request, written: int) -> None:
        self.finished += 1
        recent = min(self.finished + 1, RECENT)  # a plain mean at first, later one that forgets
        self.mean_output += (written - self.mean_output) / recent
        if request.expected_tokens:
            self.mean_excess += (written / request.expected_tokens - self.mean_excess) / recent

    def remaining(self, request: Request, written: int) -> float:
        """Tokens a text is likely to get still: as many as finished ones had, less what it has.

        What was expected of a text counts as far as it was right of others. One that has outlived that is expected to
        become longer by a quarter.
        """
        expected = request.expected_tokens * self.mean_excess
        return max((expected or self.mean_output) - written, written / 4)


class Scheduler:
    """Queue, running rows and their pages.

    `pool`: pages of the running texts. `prefixes`: the prefix cache, which may hold pages of the same pool.
    `context`: most tokens of a text. `max_rows`: texts at once. `prefill_tokens`: prompt tokens in a step.
    `special`: ids of special tokens by their text; a stop string that is one is compared by its id.
    `drafts`: what draft tokens cost (sampling/lookup.py); None = none are made.
    """

    def __init__(
        self,
        pool: PagePool,
        prefixes: PrefixCache,
        *,
        context: int,
        max_rows: int,
        prefill_tokens: int,
        special: Mapping[str, int] | None = None,
        drafts: DraftCosts | None = None,
    ):
        self.pool, self.prefixes, self.context, self.prefill_tokens = pool, prefixes, context, prefill_tokens
        self.special, self.drafts = special or {}, drafts
        self.queue: list[Waiting] = []  # a heap
        self.lengths, self.added = Lengths(), 0  # added: requests so far, their order
        self.rows: list[Row] = []  # in the order of their admission, oldest first
        self.slots = list(range(max_rows))  # those that are free
        self.stats: dict[str, float] = dict.fromkeys(
            ("prefill_tokens", "shared_tokens", "decode_tokens", "drafted_tokens", "accepted_tokens", "steps")
            + ("row_steps", "preemptions", "samples"),
            0,
        )

    def add(self, request: Request) -> None:
        """Queues a request whose prompt fits the context."""
        heapq.heappush(self.queue, Waiting(2 - request.follows, -request.expected_tokens, self.added, request))
        self.added += 1  # ties of the queue go by order

    def schedule(self, busy: Sequence[Row] = ()) -> Step:
        """The next step, empty if nothing waits or runs: admits rows, gives all their pages, makes drafts.

        busy: rows that are being decoded meanwhile, which take no part.
        """
        self._admit()
        decode, prefill = self._share_out({id(row) for row in busy})
        tokens = len(decode) + sum(count for _, count in prefill)
        self.stats["prefill_tokens"] += tokens - len(decode)
        if self.drafts:
            # Drafts continue an output: a prompt's last token is followed by nothing that was looked up.
            newest = [row for row in decode if row.computed + 1 == len(row.ids) > row.prompt_tokens]
            self._draft(newest, tokens, self.drafts)
        return Step([(row, 1 + len(row.draft)) for row in decode], prefill)

    def accept(self, row: Row, tokens: Sequence[int], end_of: Callable[[Row], End | None]) -> End | None:
        """Takes a row's drawn tokens up to the first draft mismatch, or to the text's end; returns what `end_of` said.

        tokens: one after the newest token, one after each draft. Keys and values of drafts that were wrong lie beyond
        what counts as computed: they are written over and never read.
        """
        draft, row.draft = row.draft, []
        if not row.written:  # its first draw: the prompt is computed
            self.prefixes.keep(row.request.prompt_ids, row.pages)
        end, accepted = None, -1
        for token in tokens:
            accepted += 1
            row.ids.append(token)  # the list that the lookup reads, too
            if token not in row.distinct:
                row.distinct.add(token)
                row.unwritten.append(token)
            end = end_of(row)
            if end or draft[accepted : accepted + 1] != [token]:
                break
        self.stats["row_steps"] += 1
        self.stats["decode_tokens"] += accepted + 1
        self.stats["accepted_tokens"] += accepted
        if end:
            self.finish(row)
        else:
            row.computed = len(row.ids) - 1  # the newest token is drawn, not computed
        return end

    def finish(self, row: Row) -> None:
        """The row is a finished text: its pages and its place are free."""
        self._release(row)
        self.stats["samples"] += 1
        self.lengths.learn(row.request, row.written)

    # -- rows and pages

    def grow(self, row: Row, tokens: int) -> bool:
        """Gives the row pages for `tokens` tokens: of forgotten prefixes, then the youngest row's, where none is free.

        False = the youngest was this row itself, which is preempted now.
        """
        while len(row.pages) < self.pool.pages_for(tokens):
            if self.pool.free or self.prefixes.make_free():
                row.pages.append(self.pool.take())
            else:
                youngest = self.rows[-1]  # least to compute again; and the oldest always goes on
                self.preempt(youngest)
                if youngest is row:
                    return False
        return True

    def preempt(self, row: Row) -> None:
        """Back to the queue, with its tokens and without its pages."""
        self._release(row)
        heapq.heappush(self.queue, Waiting(0, -row.request.expected_tokens, row.order, row))
        self.stats["preemptions"] += 1

    def back_off(self) -> str:
        """Smaller steps after an out-of-memory error: a line that says how, "" = they cannot become smaller."""
        if self.prefill_tokens > LEAST_CHUNK:
            self.prefill_tokens = max(LEAST_CHUNK, self.prefill_tokens // 2)
            return f"out of memory: prefill in chunks of {self.prefill_tokens} tokens from now on"
        if len(self.rows) < 2:
            return ""
        keep = len(self.rows) // 2
        while len(self.rows) > keep:
            self.preempt(self.rows[-1])
        self.slots = self.slots[: max(0, keep - len(self.rows))]  # the others are never used again
        return f"out of memory: {keep} rows at once from now on"

    def _release(self, row: Row) -> None:
        self.rows.remove(row)
        self.pool.give_back(row.pages)
        self.slots.append(row.slot)  # taken again by the next row
        row.computed, row.slot, row.draft = 0, -1, []  # its tokens stay: they are computed again, not drawn

    # -- admission

    def _admit(self) -> None:
        """Moves requests from the queue into free rows, as far as the pages are likely to last."""
        if not self.queue or not self.slots:
            return
        # Optimistic: by expected lengths. Reserving the longest possible ones would leave most pages empty.
        reserved = sum(map(self._expected_pages, self.rows))
        while self.queue and self.slots:
            entry = heapq.heappop(self.queue)
            row = entry.waiting
            if isinstance(row, Request):
                row = Row.of(row, entry.order, self.context, self.special)
            needed = self._expected_pages(row)  # all of them: it has none
            # With no row running the next is admitted whatever it needs: a single text always fits.
            free = len(self.pool.free)
            if self.rows and needed + reserved > free and needed + reserved > free + self.prefixes.spare():
                heapq.heappush(self.queue, entry)  # it stays the next: nobody overtakes it, however short
                break
            reserved += needed
            self.rows.append(row)  # the youngest from now on
            row.slot = self.slots.pop()

    def _expected_pages(self, row: Row) -> int:
        """Pages a text is likely to take still."""
        # At least a page's worth: a text that is about to end by expectation may still cross into the next page.
        more = max(self.lengths.remaining(row.request, row.written), self.pool.page_tokens)
        return max(0, self.pool.pages_for(min(row.limit, len(row.ids) + int(more))) - len(row.pages))

    # -- planning

    def _share_out(self, busy: set[int]) -> tuple[list[Row], list[tuple[Row, int]]]:
        """Rows that compute one token in this step, and (row, tokens) of those that compute a chunk. Takes pages."""
        budget = self.prefill_tokens
        decode: list[Row] = []
        prefill: list[tuple[Row, int]] = []
        computing: list[Row] = []
        for row in list(self.rows):  # the oldest first: only rows that have no tokens in this step yet are preempted
            row.draft = []
            if row.slot < 0 or id(row) in busy:  # preempted by an older row of this step
                continue
            if budget and not row.computed and not self._attach_prefix(row, computing):
                continue
            todo = len(row.ids) - row.computed  # 1 in decoding
            count = 1 if todo == 1 else min(todo, budget)
            if row.slot < 0 or not count or not self.grow(row, row.computed + count):
                continue
            if count == 1:
                decode.append(row)
            else:
                prefill.append((row, count))
            # Also a chunk of one token, when the budget has just that left.
            if todo > 1:
                budget -= count  # a decoding row costs none: its token is due in any case
                computing.append(row)
        return decode, prefill

    def _attach_prefix(self, row: Row, computing: Sequence[Row]) -> bool:
        """Starts the row on what the prefix cache has of its text.

        False = much more of it is being computed in this step, by a row of `computing`: it is worth waiting for that.
        """
        pages, shared = self.prefixes.find(row.ids)
        if any(common_prefix(row.ids, other.ids) > shared + WORTH_WAITING for other in computing):
            return False
        if shared >= SHARED:
            self.pool.give_back(row.pages)  # of an attempt that ran out of memory
            own, copied = self.prefixes.attach(pages, shared)
            row.pages += own
            if self.grow(row, shared):
                self.prefixes.copy(copied, row.pages[len(own) : len(pages)])
                row.computed = shared  # less than all: the last token is computed, for its logits
                self.stats["shared_tokens"] += shared
            self.prefixes.detach(copied)
        return True

    def drafts_pay(self, rows: Sequence[Row]) -> bool:
        """Whether a step of these rows, which decode, would have drafts."""
        return self.drafts is not None and any(self._allot(rows, len(rows), self.drafts)[1])

    def _draft(self, rows: Sequence[Row], tokens: int, costs: DraftCosts) -> None:
        """Gives drafts to the rows of a step that has `tokens` tokens without them, where they are worth their time."""
        drafts, counts = self._allot(rows, tokens, costs)
        for row, draft, count in zip(rows, drafts, counts, strict=True):
            room = (len(row.pages) + len(self.pool.free)) * self.pool.page_tokens - len(row.ids)
            count = min(count, room)  # nobody is preempted for a draft
            if count > 0 and self.grow(row, len(row.ids) + count):
                row.draft = draft[:count]
                self.stats["drafted_tokens"] += count

    def _allot(self, rows: Sequence[Row], tokens: int, costs: DraftCosts) -> tuple[list[list[int]], list[int]]:
        """(what is guessed of each row, how much of it is worth computing)."""
        drafts, chances = [], []
        bar = tokens / (costs.free_tokens + tokens)  # tokens per unit of time without drafts
        for row in rows:
            row.lookup = row.lookup or Lookup(row.ids)
            row.lookup.learn()  # also of tokens that no draft was made for
            worth = row.lookup.chances(1)[0] > bar
            # The last token of a text is drawn, never computed: no draft reaches it.
            drafts.append(row.lookup.guess(min(LONGEST, row.limit - len(row.ids) - 1)) if worth else [])
            chances.append(row.lookup.chances(len(drafts[-1])))
        counts = allot(chances, tokens, costs.free_tokens)  # drafts of each row
        right = sum(sum(some[:count]) for some, count in zip(chances, counts, strict=True))
        # Few right drafts: not worth a pass that is read by the host, where others are not.
        return drafts, counts if right > costs.hurdle * len(rows) else [0] * len(rows)
