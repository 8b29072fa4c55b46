"""Batched sampling from any Hugging Face causal LM, with continuous batching over a paged KV cache.

    sampler = Sampler(model, tokenizer, eos_ids=chat.eos_ids, context=loaded.context)
    for prompt in prompts:
        sampler.add(Request(key=..., prompt_ids=..., seed=..., sampling=Sampling(temperature=0.7)))
    for sample in sampler.run():  # as they finish; more may be added meanwhile
        ...

1. One step is one forward pass over packed tokens: the newest token of every running text, then pieces of new
   prompts up to a token budget. A finished text's place is taken in the next step. There is no padding.
2. Logits become a token as in Hugging Face's processors and in vLLM: fp32, repetition penalty over the distinct ids
   of prompt and output, temperature, top-k (ties at the edge stay), top-p, draw. Temperature 0 or top-k 1 is greedy.
3. The draw is an argmax over logits plus Gumbel noise, and the noise is a hash of (seed, position in the output,
   token id): a text does not depend on its neighbours, on the order or on the number of rows. (Logits may differ in
   the last bits with the shape of a batch, as everywhere; draws do not.)
4. A prompt that begins like one that runs, or like one of the last that ran, is copied up to there, not computed: the
   samples of a prompt, the tries of an extension and its two stages share most of theirs.
5. When the pages run out the youngest text gives its pages back, keeps its tokens, and is computed again later.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kernels.linear_cross_entropy import linear_cross_entropy, plain_head
from lengthen.attention import Hook, PagedCache, make_batch
from lengthen.decoder import physical_memory
from lengthen.draw import draw, penalise
from lengthen.graphs import DecodeGraphs
from lengthen.records import UserError

LOOP_BLOCK, LOOP_TIMES = 64, 8  # a suffix that repeats a block of <= 64 tokens >= 8 times is a loop (vLLM's rule)
SHARED = 32  # tokens; a shorter common prefix is not worth copying


@dataclass(frozen=True)
class Sampling:
    """How logits become tokens. The defaults are the paper's release, everywhere."""

    temperature: float = 0.7  # 0 = greedy
    top_p: float = 0.8  # 1 = off
    top_k: int = 20  # 0 = off
    repetition_penalty: float = 1.1  # 1 = off
    max_new_tokens: int = 16384  # capped by the context that the prompt leaves
    min_new_tokens: int = 0  # no EOS is drawn before so many; stop strings still end a text
    stop: tuple[str, ...] = ()  # the text ends before the first of them to be complete

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop))
        assert self.temperature >= 0, self.temperature
        assert 0 < self.top_p <= 1, self.top_p
        assert self.top_k >= 0, self.top_k
        assert self.repetition_penalty > 0, self.repetition_penalty
        assert self.max_new_tokens > 0, self.max_new_tokens
        assert self.min_new_tokens >= 0, self.min_new_tokens
        assert all(isinstance(s, str) and s for s in self.stop), self.stop


@dataclass
class Request:
    """One text to write. `key` is the caller's; `seed` any integer (its low 64 bits count)."""

    key: Hashable
    prompt_ids: list[int]
    seed: int
    sampling: Sampling = field(default_factory=Sampling)
    penalty_from: int = 0  # prompt ids from this index on count for the repetition penalty; output ids always do


@dataclass
class Sample:
    """A finished text. `token_ids` are the output's, a final EOS included; `text` has neither EOS nor stop string."""

    request: Request
    text: str
    token_ids: list[int]
    finish: str  # "eos", "length", "stop", "repetition" or "error"
    error: str = ""  # why there is no text; the other requests go on

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


# ---------------------------------------------------------------------------------------------------------
# From tokens to a finished text


def loops(ids: Sequence[int], start: int) -> bool:
    """Whether ids[start:] ends in a block of at most LOOP_BLOCK tokens, LOOP_TIMES times in a row."""
    for block in range(1, min(LOOP_BLOCK, (len(ids) - start) // LOOP_TIMES) + 1):
        span = block * (LOOP_TIMES - 1)
        if ids[-1] == ids[-1 - block] and ids[-span:] == ids[-span - block : -block]:
            return True
    return False


def common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many ids two texts begin with in common, 0 below SHARED; never all of `ids`: one is left to compute."""
    limit = min(len(ids) - 1, len(others))
    if limit < SHARED or list(ids[:SHARED]) != list(others[:SHARED]):
        return 0
    return next((i for i in range(SHARED, limit) if ids[i] != others[i]), limit)


@dataclass(eq=False)
class Row:
    """A text in progress: what the pages hold of it, and what the next draw needs."""

    request: Request
    ids: list[int]  # prompt and output so far
    limit: int  # length of ids at which the context or max_new_tokens ends it
    stop_ids: set[int]  # stop strings that are single special tokens: their text is never decoded
    stop_texts: list[str]
    pages: list[int] = field(default_factory=list)
    computed: int = 0  # tokens whose keys and values are in the pages
    slot: int = -1  # line of the `seen` table
    distinct: set[int] = field(default_factory=set)  # ids the repetition penalty applies to

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def output(self) -> list[int]:
        return self.ids[self.prompt_tokens :]


class Sampler:
    """Writes texts for the requests given to `add`. The model's attention is its own whenever the caller has control.

    `eos_ids` end a text. `context` is the model's, in tokens. `max_rows`: texts at once, 0 = auto. `kv_tokens`: room
    for keys and values, in tokens, 0 = auto (a quarter of the memory on a CPU, three quarters of what is free on CUDA).
    `prefill_tokens`: prompt tokens in one step, 0 = auto. `page_tokens`: 0 = auto (64 on a CPU, 256 on CUDA).
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
    ):
        self.model, self.tokenizer, self.eos_ids = model, tokenizer, set(eos_ids)
        weight = model.get_input_embeddings().weight
        self.special = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.device, cuda = weight.device, weight.device.type == "cuda"
        self.max_rows = max_rows or (256 if cuda else 48)
        self.prefill_tokens = prefill_tokens or (8192 if cuda else 512)
        page_tokens = page_tokens or (256 if cuda else 64)
        self.notes: list[str] = []
        self.hook = Hook(model)
        self.head, why = plain_head(model)  # None = scores are read from the model's own logits
        if self.head is None:
            self.notes.append(f"log-probabilities come from whole logits: {why}")
        self.vocabulary = min(len(tokenizer), model.config.get_text_config().vocab_size)
        self.context = self._fixed_rope(context)

        bytes_per_token = PagedCache.bytes_per_token(self.hook.shapes, weight.dtype)
        if not kv_tokens:
            free = torch.cuda.mem_get_info(self.device)[0] if cuda else physical_memory()
            kv_tokens = int(free * (0.75 if cuda else 0.25)) // bytes_per_token
        pages = min(-(-kv_tokens // page_tokens), self.max_rows * -(-self.context // page_tokens))
        if pages * page_tokens < self.context:
            self.context = pages * page_tokens
            self.notes.append(f"context held at {self.context} tokens: the KV memory has no room for more")
        if not pages:
            raise UserError("no memory is left for keys and values", "a smaller model, or --quantize nf4")
        self.cache = PagedCache(self.hook.shapes, pages, page_tokens, self.device, weight.dtype)
        # Prompts that ran, least recently used first: outside the pool, whose pages are all streamed when decoding.
        # On CUDA what lies outside the pool is kept for activations.
        self.past: OrderedDict[tuple[int, ...], dict] = OrderedDict()
        self.past_pages = 0 if cuda else pages // 8

        self.queue: deque[Row] = deque()
        self.rows: list[Row] = []  # oldest first
        self.finished: deque[Sample] = deque()
        self.slots = list(range(self.max_rows))
        self.seen = torch.zeros(self.max_rows, 256, dtype=torch.long, device=self.device)
        self.mean_output = 256.0  # tokens; a running mean, for admission
        self.stats = dict.fromkeys(
            ("prefill_tokens", "shared_tokens", "decode_tokens", "steps", "row_steps", "preemptions", "samples"), 0
        )
        self.stats["seconds"] = 0.0
        self.graphs = None  # where page tables are walked, steps that only decode run several at a time
        if self.cache.walked:
            size = {"rows": self.max_rows, "context": self.context, "vocabulary": self.vocabulary}
            self.graphs = DecodeGraphs(self.hook, self.cache, **size, eos_ids=self.eos_ids, notes=self.notes)

    def close(self) -> None:
        """Gives the memory of keys and values and of the weights' copies back."""
        self.hook.lent.clear()
        self.graphs = None
        self.past.clear()
        self.cache.keys.clear()
        self.cache.values.clear()

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
        prompt, sampling = request.prompt_ids, request.sampling
        if not prompt or len(prompt) >= self.context:
            why = (
                f"the prompt has {len(prompt)} tokens, the context {self.context}" if prompt else "the prompt is empty"
            )
            self.finished.append(Sample(request, "", [], "error", why))
            return
        self.queue.append(
            Row(
                request,
                list(prompt),
                limit=min(self.context, len(prompt) + sampling.max_new_tokens),
                stop_ids={self.special[s] for s in sampling.stop if s in self.special},
                stop_texts=[s for s in sampling.stop if s not in self.special],
                distinct=set(prompt[request.penalty_from :]),
            )
        )

    def run(self) -> Iterator[Sample]:
        """Yields each sample as it finishes; ends when nothing is queued or running."""
        while self.queue or self.rows or self.finished:
            if self.finished:
                yield self.finished.popleft()
            else:
                began = time.perf_counter()
                self._step()
                self.stats["seconds"] += time.perf_counter() - began

    # -- one step

    @torch.no_grad()
    def _step(self) -> None:
        if self.graphs and self.graphs.flying:
            self._burst([row for row in self.rows if row.slot in self.graphs.flying.slots])
            return
        self._admit()
        plan = self._plan()
        decoding = all(count == 1 and row.computed + 1 == len(row.ids) for row, count in plan)
        if self.graphs and decoding and self.graphs.serves([row for row, _ in plan]):
            self.stats["decode_tokens"] -= len(plan)  # _burst counts its own
            self._burst([row for row, _ in plan])
            return
        ready, keep, at = [], [], 0  # rows that have no more to compute draw a token
        for row, count in plan:
            at += count
            if row.computed + count == len(row.ids):
                ready.append(row)
                keep.append(at - 1)
        try:
            logits = self._forward(plan, keep)
        except torch.OutOfMemoryError:
            self._back_off()
            return
        for row, count in plan:
            row.computed += count
        self.stats["steps"] += 1
        self.stats["row_steps"] += len(ready)
        if ready:
            for row, token in zip(ready, self._draw(ready, logits), strict=True):
                self._advance(row, token)

    def _burst(self, rows: list[Row]) -> None:
        """Several steps for rows that only decode, on the device alone; texts are cut here where they end."""
        try:
            bursts = self.graphs.run(rows, ahead=not (self.queue and self.slots))
        except torch.OutOfMemoryError:
            self._back_off()
            return
        self.stats["steps"] += max(map(len, bursts), default=0)
        for row, tokens in zip(rows, bursts, strict=True):
            for token in tokens:
                row.computed += 1
                self.stats["decode_tokens"] += 1
                self.stats["row_steps"] += 1
                self._advance(row, token)
                if not row.pages:  # finished
                    break

    def _admit(self) -> None:
        """Moves requests from the queue into free rows, as far as the pages are likely to last."""
        waiting: list[Row] = []
        while self.queue and self.slots:
            row = self.queue.popleft()
            donor, shared = self._donor(row)
            past, known = self._past(row)
            if donor and shared > max(donor.computed, known) + 2 * SHARED:
                waiting.append(row)  # the same prompt is being computed: next step it can be copied
                continue
            if self.rows and self._expected_pages(row) + sum(map(self._expected_pages, self.rows)) > len(
                self.cache.free
            ):
                waiting.append(row)
                break
            self.rows.append(row)
            row.slot = self.slots.pop()
            self._write_seen(row)
            shared = min(shared, donor.computed) if donor else 0
            if max(shared, known) >= SHARED and self._grow(row, max(shared, known)):
                if known > shared:
                    self.cache.load(self.past[past], row.pages)
                else:
                    self.cache.copy(donor.pages[: len(row.pages)], row.pages)
                row.computed = max(shared, known)
                self.stats["shared_tokens"] += row.computed
        self.queue.extendleft(reversed(waiting))

    def _donor(self, row: Row) -> tuple[Row | None, int]:
        """The running text that begins like this one, and how many tokens they share (never all of them)."""
        best, most = None, 0
        for other in self.rows:
            same = common_prefix(row.ids, other.ids)
            if (same, other.computed) > (most, best.computed if best else 0):
                best, most = other, same
        return best, most

    def _past(self, row: Row) -> tuple[tuple[int, ...], int]:
        """The remembered prompt that begins like this text, and how many tokens they share."""
        best = max(self.past, key=lambda prompt: common_prefix(row.ids, prompt), default=())
        shared = common_prefix(row.ids, best)
        if shared:
            self.past.move_to_end(best)
        return best, shared

    def _remember(self, row: Row) -> None:
        """Keeps the keys and values of a finished text's prompt; the least recently used make room."""
        prompt = tuple(row.request.prompt_ids)
        pages = row.pages[: self.cache.pages_for(len(prompt))]
        if len(prompt) < 2 * SHARED or len(pages) > self.past_pages or prompt in self.past:
            return
        self.past[prompt] = self.cache.save(pages)
        while sum(self.cache.pages_for(len(p)) for p in self.past) > self.past_pages:
            self.past.popitem(last=False)

    def _expected_pages(self, row: Row) -> int:
        """Pages a text is still likely to take: it is expected to be as long as those that have finished."""
        more = max(self.mean_output - len(row.output), self.cache.page_tokens)
        return max(0, self.cache.pages_for(min(row.limit, len(row.ids) + int(more))) - len(row.pages))

    def _grow(self, row: Row, tokens: int) -> bool:
        """Gives the row pages for `tokens` tokens, the youngest row's if need be. False = it was the youngest."""
        while len(row.pages) < self.cache.pages_for(tokens):
            if self.cache.free:
                row.pages.append(self.cache.take())
            else:
                youngest = self.rows[-1]
                self._preempt(youngest)
                if youngest is row:
                    return False
        return True

    def _preempt(self, row: Row) -> None:
        self._release(row)
        self.queue.appendleft(row)
        self.stats["preemptions"] += 1

    def _release(self, row: Row) -> None:
        self.rows.remove(row)
        self.cache.give_back(row.pages)
        self.slots.append(row.slot)
        row.computed = 0

    def _plan(self) -> list[tuple[Row, int]]:
        """How many tokens of which rows a step computes: one of each running text, prompts up to the budget."""
        budget, decode, prefill = self.prefill_tokens, [], []
        for row in list(self.rows):  # the oldest first: only rows not planned yet are preempted
            todo = len(row.ids) - row.computed
            count = 1 if todo == 1 else min(todo, budget)
            if row not in self.rows or not count or not self._grow(row, row.computed + count):
                continue
            (decode if count == 1 else prefill).append((row, count))
            budget -= 0 if todo == 1 else count
        self.stats["decode_tokens"] += len(decode)
        self.stats["prefill_tokens"] += sum(count for _, count in prefill)
        return decode + prefill

    def _forward(self, plan: list[tuple[Row, int]], keep: list[int], hidden: bool = False) -> Tensor:
        """Runs the planned tokens, packed in this order; returns the logits [len(keep), V] fp32 of those indices.

        hidden: what the head is given, [len(keep), H], instead.
        """
        rows = {id(row): row for row in [*self.rows, *(row for row, _ in plan)]}
        self.cache.compact([row.pages for row in rows.values()])
        decode = [(row.pages, row.computed) for row, count in plan if count == 1]
        prefill = [(row.pages, row.computed, count) for row, count in plan if count > 1]
        ids = [token for row, count in plan for token in row.ids[row.computed : row.computed + count]]
        positions = [p for row, count in plan for p in range(row.computed, row.computed + count)]
        ids, positions, last = (torch.tensor(x, device=self.device) for x in (ids, positions, keep or [0]))
        out = self.hook.forward(make_batch(self.cache, decode, prefill), ids, positions, last, hidden)[: len(keep)]
        return out if hidden else out.float()

    def _back_off(self) -> None:
        """Behind an out-of-memory error: smaller pieces of prompts, then fewer rows, then the error."""
        torch.cuda.empty_cache()
        if self.prefill_tokens > 256:
            self.prefill_tokens //= 2
            self.notes.append(f"out of memory: prompts now go in pieces of {self.prefill_tokens} tokens")
        elif len(self.rows) > 1:
            keep = len(self.rows) // 2
            while len(self.rows) > keep:
                self._preempt(self.rows[-1])
            self.slots = self.slots[: max(0, keep - len(self.rows))]
            self.notes.append(f"out of memory: {keep} rows at once from now on")
        else:
            raise

    # -- tokens

    def _write_seen(self, row: Row) -> None:
        """The row's distinct ids into its line of the table; the rest of the line repeats one of them."""
        ids = sorted(row.distinct)
        while len(ids) >= self.seen.shape[1]:
            self.seen = torch.cat([self.seen, self.seen[:, :1].expand_as(self.seen)], 1)
        self.seen[row.slot] = ids[0] if ids else 0
        self.seen[row.slot, : len(ids)] = torch.tensor(ids, dtype=torch.long, device=self.device)

    def _draw(self, rows: list[Row], logits: Tensor) -> list[int]:
        """The next token of each row from its logits [n, V] fp32, which are changed in place."""
        logits[:, self.vocabulary :] = float("-inf")  # padding of the vocabulary: ids the tokenizer does not know
        settings = [row.request.sampling for row in rows]
        as_floats = torch.tensor([(s.temperature, s.top_p, s.repetition_penalty) for s in settings], device=self.device)
        as_ints = torch.tensor(
            [
                (s.top_k, signed(row.request.seed), len(row.ids) - row.prompt_tokens, len(row.distinct), row.slot)
                for row, s in zip(rows, settings, strict=True)
            ],
            device=self.device,
        )
        (temperature, top_p, penalty), (top_k, seeds, positions, counts, slots) = as_floats.T, as_ints.T
        if early := [i for i, row in enumerate(rows) if too_early(row)]:
            ends = torch.tensor(sorted(self.eos_ids), device=self.device)
            logits[torch.tensor(early, device=self.device)[:, None], ends] = float("-inf")
        if any(s.repetition_penalty != 1 for s in settings):
            width = max(1, max(len(row.distinct) for row in rows))
            penalise(logits, self.seen[slots, :width], counts, penalty)
        return draw(logits, temperature, top_k, top_p, seeds, positions).tolist()

    def _advance(self, row: Row, token: int) -> None:
        """Takes a drawn token; ends the text where it ends."""
        row.ids.append(token)
        if token not in row.distinct:
            row.distinct.add(token)
            if len(row.distinct) in (1, self.seen.shape[1]):
                self._write_seen(row)
            else:
                self.seen[row.slot, len(row.distinct) - 1] = token
        if token in self.eos_ids:
            self._finish(row, "eos", self._text(row, row.output[:-1]))
        elif token in row.stop_ids:
            self._finish(row, "stop", self._text(row, row.output[:-1]))
        elif row.stop_texts and (text := self._stopped(row)) is not None:
            self._finish(row, "stop", text)
        elif len(row.ids) >= row.limit:
            self._finish(row, "length", self._text(row, row.output).rstrip("\ufffd"))
        elif len(row.output) % LOOP_TIMES == 0 and loops(row.ids, row.prompt_tokens):
            self._finish(row, "repetition", self._text(row, row.output).rstrip("\ufffd"))

    def _finish(self, row: Row, finish: str, text: str) -> None:
        self._remember(row)
        self._release(row)
        self.finished.append(Sample(row.request, text, row.output, finish))
        self.stats["samples"] += 1
        self.mean_output += (len(row.output) - self.mean_output) / min(self.stats["samples"] + 1, 32)

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
            groups[-1].append(Row(Request(None, list(text), 0), list(text), 0, set(), []))
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


def too_early(row: Row) -> bool:
    """Whether the text must not end yet."""
    return len(row.ids) - row.prompt_tokens < row.request.sampling.min_new_tokens


def signed(seed: int) -> int:
    """The low 64 bits of an integer, as int64 has them."""
    return ((seed & 0xFFFFFFFFFFFFFFFF) ^ 1 << 63) - (1 << 63)
