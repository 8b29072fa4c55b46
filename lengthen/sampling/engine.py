"""Batched sampling from any Hugging Face causal LM, with continuous batching over a paged KV cache.

    sampler = Sampler(model, tokenizer, eos_ids=chat.eos_ids, context=loaded.context)
    for prompt in prompts:
        sampler.add(Request(key=..., prompt_ids=..., seed=..., sampling=Sampling(temperature=0.7)))
    for sample in sampler.run():  # as they finish; more may be added meanwhile
        ...

1. One step is one forward pass over packed tokens: the newest token of every running text, then pieces of new
   prompts up to a token budget. A finished text's place is taken in the next step. There is no padding. The texts
   expected to be the longest start first, so that no long one is left alone at the end.
2. Logits become a token as in Hugging Face's processors and in vLLM: fp32, repetition penalty over the distinct ids
   of prompt and output, temperature, top-k (ties at the edge stay), top-p, draw. Temperature 0 or top-k 1 is greedy.
3. The draw is an argmax over logits plus Gumbel noise, and the noise is a hash of (seed, position in the output,
   token id): a text does not depend on its neighbours, on the order or on the number of rows. (Logits may differ in
   the last bits with the shape of a batch, as everywhere; draws do not.)
4. A prompt that begins like one that ran is copied up to there, not computed (lengthen/sampling/prefix_cache.py).
5. A text that copies from its prompt or from itself is written several tokens a pass: guessed by lookup, and kept as
   far as its own draws agree, so it is the same text (lengthen/sampling/lookup.py).
6. Texts are let in by the length they are expected to reach. When the pages run out all the same, the youngest text
   gives its pages back, keeps its tokens, and is computed again later. Memory that runs out elsewhere makes the pieces
   of prompts smaller, then the rows fewer.
"""

import heapq
import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kernels.linear_cross_entropy import linear_cross_entropy, plain_head
from lengthen.models.cards import physical_memory
from lengthen.models.lora import Adapters
from lengthen.records import UserError, fingerprint
from lengthen.sampling.attend_cpu import Hook, PagedCache, make_batch, piece_batch
from lengthen.sampling.draw import draw, penalise
from lengthen.sampling.graphs import DecodeGraphs
from lengthen.sampling.lookup import LONGEST, Lookup, allot
from lengthen.sampling.meter import Meter, Progress, weight_bytes
from lengthen.sampling.prefix_cache import PrefixCache, common_prefix
from lengthen.sampling.request import Request, Sample

LOOP_BLOCK, LOOP_TIMES = 64, 8  # a suffix that repeats a block of <= 64 tokens >= 8 times is a loop (vLLM's rule)
SHARED = 8  # tokens; a shorter common prefix is not worth copying
LEAST_PIECE = 256  # prompt tokens a step; never fewer, however short the memory
WORTH_WAITING = 32  # tokens; a step is worth waiting for when so many more can then be copied
FREE = {"cpu": 24, "cuda": 256}  # tokens whose computation takes as long as reading the weights (lookup.py)
HURDLE = {"cpu": 0.0, "cuda": 1.0}  # right guesses a row that a pass with drafts must promise: on CUDA it is no graph


# ---------------------------------------------------------------------------------------------------------
# From tokens to a finished text


def loops(ids: Sequence[int], start: int) -> bool:
    """Whether ids[start:] ends in a block of at most LOOP_BLOCK tokens, LOOP_TIMES times in a row."""
    for block in range(1, min(LOOP_BLOCK, (len(ids) - start) // LOOP_TIMES) + 1):
        span = block * (LOOP_TIMES - 1)
        if ids[-1] == ids[-1 - block] and ids[-span:] == ids[-span - block : -block]:
            return True
    return False


@dataclass(eq=False)
class Row:
    """A text in progress: what the pages hold of it, and what the next draw needs."""

    request: Request
    order: int  # of the request's coming
    ids: list[int]  # prompt and output so far
    limit: int  # length of ids at which the context or max_new_tokens ends it
    stop_ids: set[int]  # stop strings that are single special tokens: their text is never decoded
    stop_texts: list[str]
    pages: list[int] = field(default_factory=list)
    computed: int = 0  # tokens whose keys and values are in the pages
    slot: int = -1  # line of the `seen` table; -1 = it is not running
    draft: list[int] = field(default_factory=list)  # guessed tokens that the pass in progress computes too
    lookup: Lookup | None = None
    distinct: set[int] = field(default_factory=set)  # ids the repetition penalty applies to
    unwritten: list[int] = field(default_factory=list)  # the newest of them, which the `seen` table still lacks

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def written(self) -> int:
        return len(self.ids) - len(self.request.prompt_ids)

    @property
    def output(self) -> list[int]:
        return self.ids[self.prompt_tokens :]


class Sampler:
    """Writes texts for the requests given to `add`. The model's attention is its own whenever the caller has control.

    `eos_ids` end a text. `context` is the model's, in tokens. `max_rows`: texts at once, 0 = auto. `kv_tokens`: room
    for keys and values, in tokens, 0 = auto (a quarter of the memory on a CPU; on CUDA nine tenths of what a pass of
    the largest size leaves). `prefill_tokens`: prompt tokens in one step, 0 = auto. `page_tokens`: 0 = auto (64 on a
    CPU, 256 on CUDA). `lookup`: whether tokens are guessed from a text's own; the texts are the same either way.
    `kv_dtype`: of keys and values, None = the model's; float8_e4m3fn on a GPU halves them, and texts differ a little.
    Raises UserError for models that the attention hook cannot carry. `notes` are lines for people, `stats` counts.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: object,
        *,
        eos_ids: set[int],
        context: int,
        max_rows: int = 0,
        kv_tokens: int = 0,
        prefill_tokens: int = 0,
        page_tokens: int = 0,
        lookup: bool = True,
        kv_dtype: torch.dtype | None = None,
    ):
        self.model, self.tokenizer, self.eos_ids = model, tokenizer, set(eos_ids)
        weight = model.get_input_embeddings().weight
        self.special = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.device, cuda = weight.device, weight.device.type == "cuda"
        self.max_rows = max_rows or (256 if cuda else 48)
        self.prefill_tokens = prefill_tokens or (8192 if cuda else 512)
        kind = self.device.type if self.device.type in FREE else "cpu"
        self.free_tokens, self.hurdle = FREE[kind] if lookup else 0, HURDLE[kind]
        page_tokens = page_tokens or (256 if cuda else 64)
        self.notes: list[str] = []
        self.hook = Hook(model)
        self.head, why = plain_head(model)  # None = scores are read from the model's own logits
        if self.head is None:
            self.notes.append(f"log-probabilities come from whole logits: {why}")
        self.vocabulary = min(len(tokenizer), model.config.get_text_config().vocab_size)
        self.context = self._fixed_rope(context)

        self.kv_dtype = kv_dtype or weight.dtype
        self.bytes_per_token = PagedCache.bytes_per_token(self.hook.shapes, self.kv_dtype)
        if not kv_tokens:
            free = self._free_on_cuda(page_tokens) if cuda else physical_memory() // 4
            kv_tokens = free // self.bytes_per_token
        pages = min(-(-kv_tokens // page_tokens), self.max_rows * -(-self.context // page_tokens))
        self.cache, self.prefixes = self._make_pools(pages, page_tokens)
        if self.cache.num_pages * page_tokens < self.context:
            self.context = self.cache.num_pages * page_tokens
            self.notes.append(f"context held at {self.context} tokens: the KV memory has no room for more")
        self.adapter = ""  # what keys and values were computed with: a key of the prefixes
        self.adapters: Adapters | None = None

        self.queue: list[tuple[int, int, int, Request | Row]] = []  # a heap: preempted texts, then the longest
        self.orders = itertools.count()
        self.queued_tokens = self.queued_unknown = 0  # sum of expected tokens; requests without a guess
        self.rows: list[Row] = []  # in the order of their admission, oldest first
        self.finished: deque[Sample] = deque()
        self.slots = list(range(self.max_rows))
        self.seen = torch.zeros(self.max_rows, 256, dtype=torch.long, device=self.device)
        self.mean_output = 256.0  # tokens; a running mean, for admission
        self.mean_excess = 1.0  # running mean of a text's length over what was expected of it
        self.stats = dict.fromkeys(
            ("prefill_tokens", "shared_tokens", "decode_tokens", "drafted_tokens", "accepted_tokens", "steps")
            + ("row_steps", "preemptions", "samples"),
            0,
        )
        self.stats["seconds"] = 0.0
        self.graphs = None  # where page tables are walked, steps that only decode run several at a time
        if self.cache.walked:
            size = {"rows": self.max_rows, "context": self.context, "vocabulary": self.vocabulary}
            self.graphs = DecodeGraphs(self.hook, self.cache, **size, eos_ids=self.eos_ids, notes=self.notes)
        self.meter, self.weight_bytes = Meter(), weight_bytes(model)

    def _make_pools(self, pages: int, page_tokens: int) -> tuple[PagedCache, PrefixCache]:
        """Pages for running texts, and an eighth of them, shared or as many more, for prompts that ran.

        What does not fit is shrunk.
        """
        asked = pages
        while pages > 0:
            try:
                past, size = -(-pages // 8), (page_tokens, self.device, self.kv_dtype)
                pool = PagedCache(self.hook.shapes, pages, *size)
                shared = PrefixCache(pool, past) if pool.walked else None
                prefixes = shared or PrefixCache(PagedCache(self.hook.shapes, past, *size))
                if pages < asked:
                    room, wish = pages * page_tokens, asked * page_tokens
                    self.notes.append(f"out of memory: keys and values have room for {room} tokens, not {wish}")
                return pool, prefixes
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                pages = pages * 9 // 10
        raise UserError("no memory is left for keys and values", "a smaller model, or --quantize nf4")

    def _free_on_cuda(self, page_tokens: int) -> int:
        """Bytes for keys and values: nine tenths of what the largest pass leaves."""
        taken = self._warm_up(page_tokens)
        torch.cuda.empty_cache()
        return max(0, int((torch.cuda.mem_get_info(self.device)[0] - taken) * 0.9))

    @torch.no_grad()
    def _warm_up(self, page_tokens: int) -> int:
        """Computes a prompt of the most tokens a step takes and draws for all rows: the bytes that took, on CUDA.

        Out of memory means smaller pieces of prompts, and another go.
        """
        cuda = self.device.type == "cuda"
        while True:
            n = min(self.prefill_tokens, self.context)
            try:
                if cuda:
                    torch.cuda.reset_peak_memory_stats(self.device)
                before = torch.cuda.memory_allocated(self.device) if cuda else 0
                cache = PagedCache(self.hook.shapes, -(-n // page_tokens), page_tokens, self.device, self.kv_dtype)
                at = torch.arange(n, device=self.device)
                last = at[-1:].expand(self.max_rows)
                batch = piece_batch(cache, list(range(cache.num_pages)), 0, n)
                logits = self.hook.forward(batch, torch.zeros_like(at), at, last).float()
                share = torch.full((self.max_rows,), 0.8, device=self.device)
                draw(logits, share, last.clamp(max=20), share, seeds=last, positions=last)
                return torch.cuda.max_memory_allocated(self.device) - before if cuda else 0
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if self.prefill_tokens <= LEAST_PIECE:
                    why = "the model leaves no memory to compute with"
                    raise UserError(why, "a smaller model, or --quantize nf4") from None
                self._smaller_pieces()

    def close(self) -> None:
        """Gives the memory of keys and values and of the weights' copies back."""
        self.hook.lent.clear()
        self.graphs = None
        self.prefixes.clear()
        self.cache.keys.clear()
        self.cache.values.clear()
        self.cache.scales.clear()

    def __enter__(self) -> "Sampler":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fixed_rope(self, context: int) -> int:
        """Some rotary scalings follow the longest text of the batch: texts are kept below where they start."""
        rope = getattr(self.model.config.get_text_config(), "rope_parameters", None) or {}
        for one in [rope, *(r for r in rope.values() if isinstance(r, dict))]:
            if one.get("rope_type") in ("dynamic", "longrope"):
                config = self.model.config.get_text_config()
                still = one.get("original_max_position_embeddings") or config.max_position_embeddings
                if context > still:
                    self.notes.append(
                        f"context held at {still} tokens: beyond it {one['rope_type']} depends on the batch"
                    )
                    context = still
        return context

    # -- requests in, samples out

    def add(self, request: Request) -> None:
        """Queues a request; also while `run` is being read. One that cannot be run comes back with finish "error"."""
        prompt = request.prompt_ids
        if not prompt or len(prompt) >= self.context:
            why = (
                f"the prompt has {len(prompt)} tokens, the context {self.context}" if prompt else "the prompt is empty"
            )
            self.finished.append(Sample(request, "", [], "error", why))
            return
        self._push((1, -request.expected_tokens, next(self.orders), request))

    def _push(self, entry: tuple[int, int, int, Request | Row], sign: int = 1) -> None:
        if sign > 0:
            heapq.heappush(self.queue, entry)
        self.queued_tokens -= sign * entry[1]
        self.queued_unknown += sign * (not entry[1])

    def _pop(self) -> tuple[int, int, int, Request | Row]:
        entry = heapq.heappop(self.queue)
        self._push(entry, -1)
        return entry

    def run(self) -> Iterator[Sample]:
        """Yields each sample as it finishes; ends when nothing is queued or running.

        Ctrl-C during a step: what has finished is handed out first, then KeyboardInterrupt goes on its way.
        """
        interrupted = False
        while self.finished or (not interrupted and (self.queue or self.rows)):
            if self.finished:
                yield self.finished.popleft()
                continue
            began = time.perf_counter()
            try:
                self._step()
            except KeyboardInterrupt:
                interrupted = True
            self.stats["seconds"] += time.perf_counter() - began
        if interrupted:
            raise KeyboardInterrupt

    def progress(self) -> Progress:
        """Where it stands."""
        done, rate = self.stats["samples"], self.meter.tokens_per_second
        tokens = self.queued_tokens * self.mean_excess + self.queued_unknown * self.mean_output
        tokens += sum(min(self._expected(row.request, row.written), row.limit - len(row.ids)) for row in self.rows)
        return Progress(
            finished=done,
            total=done + len(self.rows) + len(self.queue),
            tokens_per_second=rate,
            roofline=self.meter.roofline(self.device),
            rows=len(self.rows),
            kv=1 - len(self.cache.free) / self.cache.num_pages,
            preemptions=self.stats["preemptions"],
            accepted=self.stats["accepted_tokens"] / max(1, self.stats["steps"]),
            seconds_left=tokens / rate if rate else -1.0,
        )

    def use_adapter(self, folder: str) -> None:
        """The texts to come are written with this adapter, "" = the base model: no reload. Nothing may be running.

        The model must have been loaded without an adapter. Raises UserError for one that does not fit it.
        """
        assert not self.rows and not self.queue, "texts of the adapter before are still being written"
        self.adapters = self.adapters or Adapters(self.model)
        self.adapters.use(folder)
        self.hook.refresh()
        self.adapter = fingerprint(folder)

    # -- one step

    @torch.no_grad()
    def _step(self) -> None:
        began = time.perf_counter()
        if self.graphs and self.graphs.flying:
            self._burst([row for row in self.rows if row.slot in self.graphs.flying.slots], began)
            return
        self._admit()
        plan = self._plan()
        decoding = all(count == 1 and row.computed + 1 == len(row.ids) for row, count in plan)
        if self.graphs and decoding and self.graphs.serves([row for row, _ in plan]):
            self._burst([row for row, _ in plan], began)
            return
        asked, keep, at = [], [], 0  # rows that have no more to compute draw a token, and one behind each drafted one
        for row, count in plan:
            at += count
            if row.computed + count >= len(row.ids):
                ahead = len(row.draft)
                asked += [(row, i) for i in range(ahead + 1)]
                keep += range(at - ahead - 1, at)
        try:
            logits = self._forward(plan, keep)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            self._back_off()
            return
        for row, count in plan:
            row.computed += count
        read = sum(row.computed for row, _ in plan) * self.bytes_per_token + self.weight_bytes
        self.stats["steps"] += 1
        tokens = self._draw(asked, logits) if asked else []
        made = self.stats["decode_tokens"]
        for row in [row for row, ahead in asked if not ahead]:
            count = len(row.draft) + 1
            self._accept(row, tokens[:count])
            del tokens[:count]
        self.meter.add(time.perf_counter() - began, read, self.stats["decode_tokens"] - made)

    def _burst(self, rows: list[Row], began: float) -> None:
        """Several steps for rows that only decode, on the device alone; texts are cut here where they end."""
        try:
            bursts = self.graphs.run(rows, ahead=not (self.queue and self.slots))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            self._back_off()
            return
        steps, made = max(map(len, bursts), default=0), self.stats["decode_tokens"]
        self.stats["steps"] += steps
        for row, tokens in zip(rows, bursts, strict=True):
            for token in tokens:
                self._accept(row, [token])
                if row.slot < 0:  # finished
                    break
        read = sum(row.computed for row in rows) * self.bytes_per_token + self.weight_bytes
        self.meter.add(time.perf_counter() - began, steps * read, self.stats["decode_tokens"] - made)

    def _admit(self) -> None:
        """Moves requests from the queue into free rows, as far as the pages are likely to last."""
        if not self.queue or not self.slots:
            return
        reserved = sum(map(self._expected_pages, self.rows))
        while self.queue and self.slots:
            entry = self._pop()
            row = entry[3] if isinstance(entry[3], Row) else self._start(entry[3], entry[2])
            needed = self._expected_pages(row)
            if self.rows and needed + reserved > len(self.cache.free):
                self._push(entry)
                break
            reserved += needed
            self.rows.append(row)
            row.slot = self.slots.pop()
            self._write_seen(row)

    def _recall(self, row: Row, computing: list[Row]) -> bool:
        """Copies what is known of a text's beginning. False = much more of it is being computed now: wait for that."""
        pages, shared = self.prefixes.find(self.adapter, row.ids)
        if any(common_prefix(row.ids, other.ids) > shared + WORTH_WAITING for other in computing):
            return False
        if shared >= SHARED:
            self.cache.give_back(row.pages)  # of a try that ran out of memory
            whole, rest = self.prefixes.lend(pages, shared)
            row.pages += whole
            if self._grow(row, shared):
                self.cache.copy(rest, row.pages[len(whole) : len(pages)], self.prefixes.pool)
                row.computed = shared
                self.stats["shared_tokens"] += shared
            self.prefixes.copied(rest)
        return True

    def _start(self, request: Request, order: int) -> Row:
        prompt, sampling = request.prompt_ids, request.sampling
        return Row(
            request,
            order,
            list(prompt),
            limit=min(self.context, len(prompt) + sampling.max_new_tokens),
            stop_ids={self.special[s] for s in sampling.stop if s in self.special},
            stop_texts=[s for s in sampling.stop if s not in self.special],
            distinct=set(prompt[request.penalty_from :]),
        )

    def _expected(self, request: Request, written: int) -> float:
        """Tokens a text is likely to get still: as many as those that finished had, less what it has.

        What was said of a text counts as far as it was right of others. One that has outlived it all is expected to
        become longer by a quarter.
        """
        said = request.expected_tokens * self.mean_excess
        return max((said or self.mean_output) - written, written / 4)

    def _expected_pages(self, row: Row) -> int:
        """Pages a text is likely to take still."""
        more = max(self._expected(row.request, row.written), self.cache.page_tokens)
        return max(0, self.cache.pages_for(min(row.limit, len(row.ids) + int(more))) - len(row.pages))

    def _grow(self, row: Row, tokens: int) -> bool:
        """Gives the row pages for `tokens` tokens: of prompts that ran, then the youngest row's, where none is free.

        False = it was the youngest.
        """
        while len(row.pages) < self.cache.pages_for(tokens):
            if self.cache.free or self.prefixes.give_way():
                row.pages.append(self.cache.take())
            else:
                youngest = self.rows[-1]
                self._preempt(youngest)
                if youngest is row:
                    return False
        return True

    def _preempt(self, row: Row) -> None:
        self._release(row)
        self._push((0, -row.request.expected_tokens, row.order, row))
        self.stats["preemptions"] += 1

    def _release(self, row: Row) -> None:
        self.rows.remove(row)
        self.cache.give_back(row.pages)
        self.slots.append(row.slot)
        row.computed, row.slot, row.draft = 0, -1, []

    def _plan(self) -> list[tuple[Row, int]]:
        """How many tokens of which rows a step computes: one of each running text, prompts up to the budget, drafts."""
        budget, decode, prefill, computing = self.prefill_tokens, [], [], []
        for row in list(self.rows):  # the oldest first: only rows not planned yet are preempted
            row.draft = []
            if row.slot >= 0 and budget and not row.computed and not self._recall(row, computing):
                continue
            todo = len(row.ids) - row.computed
            count = 1 if todo == 1 else min(todo, budget)
            if row.slot < 0 or not count or not self._grow(row, row.computed + count):
                continue
            (decode if count == 1 else prefill).append((row, count))
            if todo > 1:
                budget -= count
                computing.append(row)
        prompts = sum(count for _, count in prefill)
        self.stats["prefill_tokens"] += prompts
        if self.free_tokens:
            newest = [row for row, _ in decode if row.computed + 1 == len(row.ids) > row.prompt_tokens]
            self._guess(newest, len(decode) + prompts)
        return [(row, 1 + len(row.draft)) for row, _ in decode] + prefill

    def _guess(self, rows: list[Row], tokens: int) -> None:
        """Gives drafts to the rows of a pass that has so many tokens without them, where they are worth their time."""
        drafts, chances, bar = [], [], tokens / (self.free_tokens + tokens)
        for row in rows:
            row.lookup = row.lookup or Lookup(row.ids)
            row.lookup.learn()
            worth = row.lookup.chances(1)[0] > bar
            drafts.append(row.lookup.guess(min(LONGEST, row.limit - len(row.ids) - 1)) if worth else [])
            chances.append(row.lookup.chances(len(drafts[-1])))
        counts = allot(chances, tokens, self.free_tokens)
        right = sum(sum(some[:count]) for some, count in zip(chances, counts, strict=True))
        if right <= self.hurdle * len(rows):
            return
        for row, draft, count in zip(rows, drafts, counts, strict=True):
            spare = (len(row.pages) + len(self.cache.free)) * self.cache.page_tokens - len(row.ids)
            count = min(count, spare)  # nobody is preempted for a guess
            if count > 0 and self._grow(row, len(row.ids) + count):
                row.draft = draft[:count]
                self.stats["drafted_tokens"] += count

    def _forward(self, plan: list[tuple[Row, int]], keep: list[int], hidden: bool = False) -> Tensor:
        """Runs the planned tokens, packed in this order; returns the logits [len(keep), V] fp32 of those indices.

        hidden: what the head is given, [len(keep), H], instead.
        """
        rows = {id(row): row for row in [*self.rows, *(row for row, _ in plan)]}
        self.cache.compact([row.pages for row in rows.values()])
        decode = [(row.pages, row.computed, count) for row, count in plan if count == 1 + len(row.draft)]
        prefill = [(row.pages, row.computed, count) for row, count in plan if count != 1 + len(row.draft)]
        ids = [t for row, count in plan for t in (*row.ids[row.computed : row.computed + count], *row.draft)]
        positions = [p for row, count in plan for p in range(row.computed, row.computed + count)]
        ids, positions, last = (torch.tensor(x, device=self.device) for x in (ids, positions, keep or [0]))
        out = self.hook.forward(make_batch(self.cache, decode, prefill), ids, positions, last, hidden)[: len(keep)]
        return out if hidden else out.float()

    def _back_off(self) -> None:
        """Behind an out-of-memory error: smaller pieces of prompts, then fewer rows, then the error."""
        torch.cuda.empty_cache()
        if self.prefill_tokens > LEAST_PIECE:
            self._smaller_pieces()
        elif len(self.rows) > 1:
            keep = len(self.rows) // 2
            while len(self.rows) > keep:
                self._preempt(self.rows[-1])
            self.slots = self.slots[: max(0, keep - len(self.rows))]
            self.notes.append(f"out of memory: {keep} rows at once from now on")
        else:
            raise

    def _smaller_pieces(self) -> None:
        self.prefill_tokens = max(LEAST_PIECE, self.prefill_tokens // 2)
        self.notes.append(f"out of memory: prompts now go in pieces of {self.prefill_tokens} tokens")

    # -- tokens

    def _write_seen(self, row: Row) -> None:
        """The row's distinct ids into its line of the table."""
        ids = sorted(row.distinct)
        row.unwritten.clear()
        self._widen(len(ids))
        self.seen[row.slot, : len(ids)] = torch.tensor(ids, dtype=torch.long, device=self.device)

    def _widen(self, columns: int) -> None:
        while columns > self.seen.shape[1]:
            self.seen = torch.cat([self.seen, torch.zeros_like(self.seen)], 1)

    def _see_drafts(self, asked: list[tuple[Row, int]]) -> list[int]:
        """How many ids the penalty applies to at each draw.

        A line of `seen` goes on with the draft's new ids, in order: those that are then drawn are in their place,
        others are written over.
        """
        counts, writes = [], []  # writes: (slot, column, id)
        for row, ahead in asked:
            if not ahead:
                line = row.unwritten  # drawn since the last time, then what the draft adds
                first, row.unwritten = len(row.distinct) - len(line), []
                writes += [(row.slot, first + i, token) for i, token in enumerate(line)]
            elif row.draft[ahead - 1] not in row.distinct and row.draft[ahead - 1] not in line:
                writes.append((row.slot, first + len(line), row.draft[ahead - 1]))
                line.append(row.draft[ahead - 1])
            counts.append(first + len(line))
        self._widen(max(counts))
        if writes:
            slots, columns, tokens = torch.tensor(writes, device=self.device).T
            self.seen[slots, columns] = tokens
        return counts

    def _draw(self, asked: list[tuple[Row, int]], logits: Tensor) -> list[int]:
        """A token for each (row, drafted tokens in front of it) from its logits [n, V] fp32, changed in place."""
        logits[:, self.vocabulary :] = float("-inf")  # padding of the vocabulary: ids the tokenizer does not know
        settings, counts = [row.request.sampling for row, _ in asked], self._see_drafts(asked)
        as_floats = torch.tensor([(s.temperature, s.top_p, s.repetition_penalty) for s in settings], device=self.device)
        as_ints = torch.tensor(
            [
                (s.top_k, signed(row.request.seed), row.written + ahead, count, row.slot)
                for (row, ahead), s, count in zip(asked, settings, counts, strict=True)
            ],
            device=self.device,
        )
        (temperature, top_p, penalty), (top_k, seeds, positions, valid, slots) = as_floats.T, as_ints.T
        if early := [i for i, one in enumerate(asked) if too_early(*one)]:
            ends = torch.tensor(sorted(self.eos_ids), device=self.device)
            logits[torch.tensor(early, device=self.device)[:, None], ends] = float("-inf")
        if any(s.repetition_penalty != 1 for s in settings):
            penalise(logits, self.seen[slots, : max(1, *counts)], valid, penalty)
        return draw(logits, temperature, top_k, top_p, seeds, positions).tolist()

    def _accept(self, row: Row, tokens: list[int]) -> None:
        """Takes a row's drawn tokens as far as each was drawn behind the right text, or to the text's end.

        Keys and values of drafted tokens that were wrong lie beyond what counts as computed: written over, never read.
        """
        draft, row.draft = row.draft, []
        if not row.written:
            self.prefixes.keep(self.adapter, row.request.prompt_ids, self.cache, row.pages)
        self.stats["row_steps"] += 1
        for i, token in enumerate(tokens):
            self._advance(row, token)
            self.stats["decode_tokens"] += 1
            if row.slot < 0 or draft[i : i + 1] != [token]:
                break
        self.stats["accepted_tokens"] += i
        if row.slot >= 0:
            row.computed = len(row.ids) - 1

    def _advance(self, row: Row, token: int) -> None:
        """Takes a drawn token; ends the text where it ends."""
        row.ids.append(token)
        if token not in row.distinct:
            row.distinct.add(token)
            row.unwritten.append(token)
        if token in self.eos_ids:
            self._finish(row, "eos", self._text(row, row.output[:-1]))
        elif token in row.stop_ids:
            self._finish(row, "stop", self._text(row, row.output[:-1]))
        elif row.stop_texts and (text := self._stopped(row)) is not None:
            self._finish(row, "stop", text)
        elif len(row.ids) >= row.limit:
            self._finish(row, "length", self._text(row, row.output).rstrip("\ufffd"))
        elif row.written % LOOP_TIMES == 0 and loops(row.ids, row.prompt_tokens):
            self._finish(row, "repetition", self._text(row, row.output).rstrip("\ufffd"))

    def _finish(self, row: Row, finish: str, text: str) -> None:
        self._release(row)
        self.finished.append(Sample(row.request, text, row.output, finish))
        self.stats["samples"] += 1
        recent = min(self.stats["samples"] + 1, 32)
        self.mean_output += (row.written - self.mean_output) / recent
        if row.request.expected_tokens:
            self.mean_excess += (row.written / row.request.expected_tokens - self.mean_excess) / recent

    # -- text

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _text(self, row: Row, output: list[int]) -> str:
        """The output as it continues the prompt: decoded behind the prompt's last ids, for some tokenizers drop a
        leading space of whatever they are given."""
        lead = row.request.prompt_ids[-8:]
        before, both = self._decode(lead), self._decode(lead + output)
        return both[len(before) :] if both.startswith(before) else self._decode(output)

    def _stopped(self, row: Row) -> str | None:
        """The text in front of the stop string that is complete first (ties: the first given), None = none is.

        Looked for after every token, in the last few only; found there, it is located in the whole text.
        """
        reach = max(len(s.encode()) for s in row.stop_texts) + 4  # every token but special ones has a byte or more
        tail = self._decode(row.ids[max(row.prompt_tokens, len(row.ids) - reach) :])
        if not any(s in tail for s in row.stop_texts):
            return None
        text = self._text(row, row.output)
        ends = [text.find(s) + len(s) if s in text else len(text) + 1 for s in row.stop_texts]
        end = min(ends)
        return None if end > len(text) else text[: end - len(row.stop_texts[ends.index(end)])]

    # -- scores

    @torch.no_grad()
    def logprobs(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
        """Natural log-probabilities of given continuations under the model, without penalty or temperature.

        pairs: (prompt ids, continuation ids). Returns one fp32 tensor [len(continuation)] on the CPU per pair. Pairs
        that differ in their last token only (a judge's yes and no) share one pass.
        """
        texts: dict[tuple[int, ...], list[int]] = {}  # what is computed -> the pairs that read from it
        for i, (prompt, continuation) in enumerate(pairs):
            assert prompt, "a continuation needs a prompt"
            if len(prompt) + len(continuation) > self.context:
                raise UserError(f"{len(prompt) + len(continuation)} tokens do not fit the context of {self.context}")
            texts.setdefault(tuple(prompt + continuation)[:-1], []).append(i)
        out = [torch.zeros(len(continuation)) for _, continuation in pairs]
        # A group is many short texts in one pass, or one long text in several. Where the loss kernel does not know the
        # head, the fp32 logits of a pass stay under 256 MB.
        budget = self.prefill_tokens
        if self.head is None:
            budget = max(16, min(budget, 2**26 // self.model.config.get_text_config().vocab_size))
        groups: list[list[Row]] = []
        tokens = pages = 0
        for text in texts:
            tokens, pages = tokens + len(text), pages + self.cache.pages_for(len(text))
            if not groups or tokens > budget or pages > self.cache.num_pages:
                groups.append([])
                tokens, pages = len(text), self.cache.pages_for(len(text))
            groups[-1].append(Row(Request(None, list(text), 0), 0, list(text), 0, set(), []))
        for group in groups:
            for row in group:
                while not self._grow(row, len(row.ids)):
                    pass
            while any(row.computed < len(row.ids) for row in group):
                self._score([(row, min(len(row.ids) - row.computed, budget)) for row in group], texts, pairs, out)
            for row in group:
                self.cache.give_back(row.pages)
        return out

    def _score(self, plan: list[tuple[Row, int]], texts: dict, pairs: Sequence, out: list[Tensor]) -> None:
        """One pass of `logprobs`: computes the planned tokens and fills in what the pairs read from them."""
        plan.sort(key=lambda one: one[1] > 1)  # single tokens go in front, as in a step
        keep, readers, at = [], [], 0  # packed index -> (pair, index in its continuation)
        for row, count in plan:
            for i in texts[tuple(row.ids)]:
                prompt, continuation = pairs[i]
                for j in range(len(continuation)):
                    place = len(prompt) - 1 + j - row.computed
                    if 0 <= place < count:
                        keep.append(at + place)
                        readers.append((i, j, continuation[j]))
            at += count
        scored = self._forward(plan, keep, hidden=self.head is not None)
        if keep:
            tokens = torch.tensor([token for _, _, token in readers], device=self.device)
            if self.head is None:
                values = scored.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            else:
                options = {"reduction": "sum", "return_stats": True, **self.head._asdict()}
                values = linear_cross_entropy(scored, targets=tokens, **options)[1].logprob
            for (i, j, _), value in zip(readers, values.tolist(), strict=True):
                out[i][j] = value
        for row, count in plan:
            row.computed += count


def too_early(row: Row, ahead: int) -> bool:
    """Whether the text must not end yet, `ahead` tokens further on."""
    return row.written + ahead < row.request.sampling.min_new_tokens


def out_of_memory(error: RuntimeError) -> bool:
    """Also a CPU's, which torch knows by its message only."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def signed(seed: int) -> int:
    """The low 64 bits of an integer, as int64 has them."""
    return ((seed & 0xFFFFFFFFFFFFFFFF) ^ 1 << 63) - (1 << 63)
