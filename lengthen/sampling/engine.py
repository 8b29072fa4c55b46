"""Batched sampling from any Hugging Face causal LM, with continuous batching over a paged KV cache.

    sampler = Sampler(model, tokenizer, eos_ids=chat.eos_ids, context=loaded.context)
    for prompt in prompts:
        sampler.add(Request(key=..., prompt_ids=..., seed=..., sampling=Sampling(temperature=0.7)))
    for sample in sampler.run():  # as they finish; more may be added meanwhile
        ...

One step is schedule -> forward -> draw -> advance, each a module of its own, to be read in this order:

    scheduler.py     which tokens of which texts the next forward pass computes: admission, chunks, drafts, preemption
    hook.py          the pass: the unmodified model on packed tokens, with our attention (attend.py) over a paged KV
                     cache (pages.py, cache.py, prefix_cache.py), in few operations (layer.py, layouts.py)
    draw.py          from logits to tokens, as in Hugging Face's processors and in vLLM
    stopping.py      whether a text ends with its newest token

On a GPU steps that only decode are captured and replayed several at a time (graphs.py), and the passes over new prompts
are queued behind them. The draw's noise is a hash of (seed, position in the output, token id): a text does not depend
on its neighbours, on the order or on the number of rows. (Logits may differ in the last bits with the shape of a batch,
as everywhere; draws do not.)
"""

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kernels.linear_cross_entropy import plain_head
from lengthen.errors import out_of_memory
from lengthen.models.errors import logits_not_finite
from lengthen.models.threads import Neighbours
from lengthen.models.upload import upload
from lengthen.sampling import cache as caches
from lengthen.sampling.cache import bytes_per_token
from lengthen.sampling.draw import NOT_FINITE, Drawer
from lengthen.sampling.graphs import DecodeGraphs
from lengthen.sampling.hook import Hook
from lengthen.sampling.lookup import COSTS
from lengthen.sampling.memory import kv_room, make_caches
from lengthen.sampling.meter import Meter, Progress, weight_bytes
from lengthen.sampling.request import ROWS, Pairs, Request, Sample
from lengthen.sampling.scheduler import Row, Scheduler, Step
from lengthen.sampling.scores import Scores
from lengthen.sampling.stopping import Stopping


class Sampler:
    """Writes texts for the requests given to `add`. The model's attention is its own whenever the caller has control.

    `eos_ids` end a text. `context` is the model's, in tokens. `max_rows`: texts at once, 0 = auto. `kv_tokens`: room
    for keys and values, in tokens, 0 = auto (a quarter of the memory on a CPU; on CUDA nine tenths of what a pass of
    the largest size leaves). `prefill_tokens`: prompt tokens in one step, 0 = auto. `page_tokens`: 0 = auto (64 on a
    CPU, 256 on CUDA). `lookup`: whether draft tokens are looked up in a text; the texts are the same either way.
    `kv_dtype`: of keys and values, None = the model's; float8_e4m3fn on a GPU halves them, and texts differ a little.
    Raises UserError for models that the attention hook cannot carry. `notes` are lines for people, `stats` counts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
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
        self.model, self.tokenizer = model, tokenizer
        self.notes: list[str] = []
        self.hook = Hook(model)
        self.notes += self.hook.notes
        self.device, cuda = self.hook.device, self.hook.device.type == "cuda"
        max_rows = max_rows or ROWS[self.device.type]
        chunk, page_tokens = prefill_tokens or (8192 if cuda else 512), page_tokens or (256 if cuda else 64)
        config = model.config.get_text_config()  # of multimodal models the part that writes
        self.eos_ids = {i for i in eos_ids if i < config.vocab_size}
        # A padded head, or a vocabulary with holes, has ids without a text: they are never drawn.
        known = {*tokenizer.get_vocab().values(), *self.eos_ids}
        unknown = torch.tensor([i for i in range(config.vocab_size) if i not in known], dtype=torch.long)
        context = self._within_rope(context)

        # 1) the cache: sized by what is free, and never larger than all rows at full length could fill
        dtype = kv_dtype or self.hook.dtype
        self.kv_bytes = bytes_per_token(self.hook.shapes, dtype)  # of a token
        if not kv_tokens:
            kv_tokens, fits = kv_room(self.hook, dtype, page_tokens, chunk, context, max_rows)
            if fits < chunk:
                chunk = fits
                self.notes.append(f"out of memory: prefill in chunks of {chunk} tokens from now on")
        pages = min(-(-kv_tokens // page_tokens), max_rows * -(-context // page_tokens))
        self.cache, prefixes = make_caches(self.hook, pages, page_tokens, dtype, self.notes)
        self.context = min(context, self.cache.num_pages * page_tokens)
        if self.context < context:
            self.notes.append(f"context held at {self.context} tokens: the KV memory has no room for more")

        # 2) who is next, what is drawn, where a text ends
        self.stopping = Stopping(tokenizer, self.eos_ids)
        self.scheduler = Scheduler(
            *(self.cache, prefixes),
            context=self.context,
            max_rows=max_rows,
            prefill_tokens=chunk,
            special=self.stopping.special,
            drafts=COSTS.get(self.device.type, COSTS["cpu"]) if lookup else None,
        )
        self.drawer = Drawer(max_rows, unknown, self.eos_ids, self.device)
        self.graphs: DecodeGraphs | None = None
        if caches.on_gpu(self.device):
            size = {"rows": max_rows, "context": self.context}
            self.graphs = DecodeGraphs(
                self.hook, self.cache, **size, unknown=unknown, eos_ids=self.eos_ids, notes=self.notes
            )

        # 3) scores, and how fast it all is
        head, why = plain_head(model)
        if head is None:
            self.notes.append(f"log-probabilities come from whole logits: {why}")
        self.scores = Scores(self.scheduler, head, config.vocab_size, self.device)
        self.finished: deque[Sample] = deque()  # ready for `run` to yield
        self.stats = self.scheduler.stats  # one set of counts for people
        self.stats["seconds"] = 0.0
        self.meter, self.weight_bytes = Meter(), weight_bytes(model)  # bytes that every pass reads
        self.neighbours = Neighbours()

    def __enter__(self) -> "Sampler":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the memory of keys and values and of the weights' copies back."""
        self.hook.replaced.clear()
        self.neighbours.close()
        self.graphs = None  # they hold buffers, and the memory of their captures
        self.scheduler.prefixes.close()
        self.cache.close()

    def _within_rope(self, context: int) -> int:
        """Some rotary scalings follow the longest text of the batch: texts are kept below where they start."""
        config = self.model.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        for settings in [rope, *(r for r in rope.values() if isinstance(r, dict))]:  # one for each type of layer
            scaling = settings.get("rope_type")
            if scaling not in ("dynamic", "longrope"):
                continue
            start = settings.get("original_max_position_embeddings") or config.max_position_embeddings
            if context > start:
                self.notes.append(f"context held at {start} tokens: beyond it {scaling} depends on the batch")
                context = start
        return context

    # -- requests in, samples out

    def add(self, request: Request) -> None:
        """Queues a request; also while `run` is being read. One that cannot be run comes back with finish "error"."""
        if why := request.misfit(self.context):
            self.finished.append(Sample(request, "", [], "error", why))
        else:
            self.scheduler.add(request)

    def run(self) -> Iterator[Sample]:
        """Yields each sample as it finishes; ends when nothing is queued or running.

        Ctrl-C during a step: what has finished is handed out first, then KeyboardInterrupt goes on its way.
        """
        interrupted = False
        while self.finished or (not interrupted and (self.scheduler.queue or self.scheduler.rows)):
            if self.finished:
                yield self.finished.popleft()
                continue
            try:
                self.step()
            except KeyboardInterrupt:
                interrupted = True  # no further step
        if interrupted:
            raise KeyboardInterrupt

    def logprobs(self, pairs: Pairs) -> list[Tensor]:
        """Natural log-probabilities of given continuations under the model, without penalty or temperature.

        pairs: (prompt ids, continuation ids). Returns one fp32 tensor [len(continuation)] on the CPU per pair. Pairs
        that differ in their last token only (a judge's yes and no) share one pass. Also while `run` is being read.
        """
        values = self.scores.logprobs(pairs, self._forward)
        if any(x.isnan().any() for x in values):
            raise logits_not_finite(self.model)
        return values

    def progress(self) -> Progress:
        """Where it stands."""
        return Progress(
            tokens_per_second=self.meter.tokens_per_second,
            roofline=self.meter.roofline(self.device),
            rows=len(self.scheduler.rows),
            kv=1 - (len(self.cache.free) + self.scheduler.prefixes.spare()) / self.cache.num_pages,
            preemptions=int(self.stats["preemptions"]),
            accepted=self.stats["accepted_tokens"] / max(1, self.stats["steps"]),
        )

    # -- a step

    def step(self) -> None:
        """One step, timed: seconds, bytes that had to be read, tokens written."""
        self.neighbours.look()
        began, steps, tokens = time.perf_counter(), self.stats["steps"], self.stats["decode_tokens"]
        rows = self._step()
        seconds = time.perf_counter() - began
        self.stats["seconds"] += seconds
        # every pass reads all weights once, and the keys and values of its rows
        read = self.weight_bytes + sum(row.computed for row in rows) * self.kv_bytes
        self.meter.add(seconds, int((self.stats["steps"] - steps) * read), self.stats["decode_tokens"] - tokens)

    @torch.no_grad()
    def _step(self) -> list[Row]:
        """Schedule -> forward -> draw -> advance. Returns the rows that took part."""
        graphs = self.graphs
        flying = [row for row in graphs.in_flight.rows if row.slot >= 0] if graphs and graphs.in_flight else []
        step = self.scheduler.schedule(flying)  # who, and how many tokens
        if graphs and graphs.in_flight:
            return self._beside(step, [row for row in flying if row.slot >= 0])
        rows = [row for row, _ in step.decode]
        try:
            if graphs and step.decodes_newest and graphs.serves(rows):
                if not step.prefill:
                    return self._burst(rows, ahead=True)
                graphs.start(rows)
                return self._beside(Step([], step.prefill), rows)
            logits = self._forward(step, step.draws()[1])
        except RuntimeError as error:
            return self._back_off(error)
        return self._take(step, logits)

    def _take(self, step: Step, logits: Tensor) -> list[Row]:
        """Draws from the logits of a step that was computed."""
        draws, _ = step.draws()
        step.mark_computed()
        self.stats["steps"] += 1  # a forward pass
        tokens = self.drawer.draw(draws, logits) if draws else []
        if NOT_FINITE in tokens:
            raise logits_not_finite(self.model)
        for i, (row, drafts) in enumerate(draws):
            if not drafts:  # the first of the row's draws: with it those after its drafts
                self._advance(row, tokens[i : i + 1 + len(row.draft)])
        return [row for row, _ in step.work]

    def _beside(self, step: Step, flying: list[Row]) -> list[Row]:
        """A step of new prompts beside a burst in flight: its pass is queued after it, before the burst is read.

        So the device does not wait while the host launches the pass. A row whose prompt is computed joins the others
        when no burst is in flight, so none is launched ahead then; nor where drafts, which the host makes, would pay.
        """
        logits: Tensor | None = None
        try:
            logits = self._forward(step, step.draws()[1]) if step else None
        except RuntimeError as error:  # the burst is still to be read
            self._back_off(error)
            flying = [row for row in flying if row.slot >= 0]
        mine = {id(row) for row in flying}
        computing = sum(row.computed + count < len(row.ids) for row, count in step.work)
        others = sum(id(row) not in mine for row in self.scheduler.rows)
        rows = self._burst(flying, ahead=others == computing and not self.scheduler.drafts_pay(flying))
        if logits is not None and all(row.slot >= 0 for row, _ in step.work):  # else computed again: memory ran out
            rows = rows + self._take(step, logits)
        return rows

    def _burst(self, rows: list[Row], ahead: bool) -> list[Row]:
        """Steps for rows that only decode, on the device alone; texts are cut here where they end."""
        assert self.graphs
        drafts = any(row.draft for row in rows)
        try:
            bursts = self.graphs.run(rows, ahead)
        except RuntimeError as error:
            return self._back_off(error)
        self.stats["steps"] += 1 if drafts else max(map(len, bursts), default=0)
        for row, tokens in zip(rows, bursts, strict=True):
            # of drafts all at once; else one by one, since what the device wrote after a text's end does not count
            for some in [tokens] if drafts and tokens else [[token] for token in tokens]:
                self._advance(row, some)
                if row.slot < 0:
                    break
        return rows

    def _forward(self, step: Step, keep: list[int], hidden: bool = False) -> Tensor:
        """One forward pass over the step's tokens -> logits [len(keep), V] fp32 of those packed indices.

        hidden: what the head is given, [len(keep), H], instead.
        """
        work = step.work
        decode, prefill = ([(row.pages, row.computed, count) for row, count in x] for x in (step.decode, step.prefill))
        ids = [t for row, count in work for t in (*row.ids[row.computed : row.computed + count], *row.draft)]
        positions = [p for row, count in work for p in range(row.computed, row.computed + count)]
        # A pass that draws nothing asks for the logits of its first token: no head is given an empty input.
        tokens, places, last = (upload(x, torch.long, self.device) for x in (ids, positions, keep or [0]))
        out = self.hook.forward(self.cache.batch(decode, prefill), tokens, places, last, hidden)[: len(keep)]
        return out if hidden else out.float()

    def _advance(self, row: Row, tokens: list[int]) -> None:
        """Takes the row's drawn tokens; hands its text out if it ends."""
        if end := self.scheduler.accept(row, tokens, self.stopping.end_of):
            finish, text = end
            self.finished.append(Sample(row.request, text, row.output, finish))

    def _back_off(self, error: RuntimeError) -> list[Row]:
        """After an out-of-memory error: smaller steps, and no row took part in this one. Raises what it cannot help."""
        if not out_of_memory(error):
            raise error
        torch.cuda.empty_cache()  # fragments of the failed pass
        if not (note := self.scheduler.back_off()):
            raise error
        self.notes.append(note)  # the next step tries again, smaller
        return []  # nothing was computed
