"""Decoding on a GPU without the host: one step as a CUDA graph, replayed several times before its tokens are read.

A step of a small batch is hundreds of kernels of a few microseconds each; started one by one from Python they take
longer than reading the weights. So the whole step (forward pass, repetition penalty, top-k, top-p, draw, and the
bookkeeping for the next one) is captured once per batch size and replayed:

1. Everything a step reads or writes lies in static buffers: per row the newest token, its position, where the text must
   end, seed and sampling parameters; the page table; which ids the penalty applies to, as a mask per row.
2. A step advances them itself: the drawn token becomes the next input, positions and lengths grow by one, the id joins
   the mask, the slot of the next key follows from the page table. Pages for all steps of a burst are taken beforehand.
3. After `steps` replays the host reads [steps, rows] token ids at once and cuts each text where it ends. A row whose
   text ended in the middle has gone on harmlessly; one that reached its limit has stood still.
4. Batch sizes are rounded up to a bucket; the rows in excess have length 0: they store nothing, read no page, and their
   draws are dropped.

The draws are those of lengthen/draw.py, bit for bit, with one exception that the device can see: more than CANDIDATES
ids that must be ranked. Such a draw is marked, the row is cut in front of it, and the caller's next step (which may
look at the whole vocabulary) makes it. Rows whose top-k is off or that large are not served at all.

Without a GPU, or where a model cannot be captured, the same step runs eagerly on the same buffers, and that is said.
No GPU has run this yet: on a CPU it is proven up to the capture itself (tests/test_graphs.py).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from lengthen import walk
from lengthen.attention import Hook, PagedCache
from lengthen.draw import CANDIDATES, keep, race, top_candidates

STEPS = 8  # per host read: of a text that ends in the middle, 3.5 tokens are computed for nothing on average


class Running(Protocol):
    """What is asked of a row (sampler.Row): a text whose newest token is not computed yet."""

    ids: list[int]  # prompt and output so far
    limit: int  # length of ids at which it ends
    pages: list[int]  # room for all of ids at least
    slot: int  # its own number below `rows`
    distinct: set[int]  # ids the repetition penalty applies to
    request: object  # .seed and .sampling
    prompt_tokens: int


def buckets(rows: int) -> list[int]:
    """Batch sizes that are captured, up to `rows`: dense where a step is short, then every 32."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, *range(96, rows, 32)]
    return [size for size in sizes if size < rows] + [rows]


class DecodeGraphs:
    """Bursts of decoding steps for up to `rows` texts in pages of `cache`, which must be walked (attention.walked).

    `context`: most tokens of a text. `vocabulary`: ids from here on are never drawn. `eos_ids` are not drawn before a
    row's `min_new_tokens`. Lines for people are appended to `notes`.
    """

    def __init__(
        self,
        hook: Hook,
        cache: PagedCache,
        *,
        rows: int,
        context: int,
        vocabulary: int,
        eos_ids: set[int],
        notes: list[str],
        steps: int = STEPS,
    ):
        assert cache.walked, "a pool that is streamed has no page tables"
        self.hook, self.cache, self.rows, self.steps, self.vocabulary = hook, cache, rows, steps, vocabulary
        self.device = next(iter(cache.keys.values())).device
        self.width = hook.model.config.get_text_config().vocab_size  # of the logits
        new = partial(torch.zeros, device=self.device)
        # token, position, end, written, least, seed, top_k, line: see _step
        self.ints = new(8, rows, dtype=torch.long)
        self.floats = new(3, rows)  # temperature, top_p, penalty
        self.table = new(rows, cache.pages_for(context), dtype=torch.int32)
        self.seen = new(rows + 1, self.width, dtype=torch.bool)  # the last line is that of rows in excess
        self.out, self.step = new(steps, rows, dtype=torch.long), new(1, dtype=torch.long)
        self.every = torch.arange(rows, device=self.device)
        ends = [token for token in sorted(eos_ids) if token < self.width]
        self.ends = torch.tensor(ends, dtype=torch.long, device=self.device)
        self.lines: dict[int, tuple[Running, int]] = {}  # slot -> whose ids, and how many of them, its line has
        self.replays: dict[int, Callable[[], None]] = {}
        self.pool = None  # of the memory that all graphs use in turn
        self.paused, self.notes = False, notes
        self.eager = "" if self.device.type == "cuda" else "there is no GPU"
        if self.eager:
            self._say()

    def serves(self, rows: Sequence[Running]) -> bool:
        """Whether `run` may be called now: not for rows it cannot draw for, nor right behind a draw it left out."""
        paused, self.paused = self.paused, False
        return bool(rows) and not paused and all(map(self._draws, rows))

    def _draws(self, row: Running) -> bool:
        sampling = row.request.sampling
        return sampling.temperature < 1e-5 or 0 < sampling.top_k < CANDIDATES or self.width <= CANDIDATES

    @torch.no_grad()
    def run(self, rows: Sequence[Running]) -> list[list[int]]:
        """The next tokens of each row, as many as there were steps; fewer where a draw was left to the caller.

        Takes pages out of the pool for the rows. The keys and values of all returned tokens but a row's last are in
        its pages. A text that ends among its tokens is the caller's to cut.
        """
        steps = self._reserve(rows)
        size = next(b for b in buckets(self.rows) if b >= len(rows))
        replay = self.replays.get(size) or self._capture(size)
        self._load(rows, size)
        try:
            for _ in range(steps):
                replay()
            drawn = self.out[:steps, : len(rows)].T.tolist()  # the one host read
        except BaseException:
            self.lines.clear()  # the masks may have ids of draws that nobody has read
            raise
        result = []
        for row, tokens in zip(rows, drawn, strict=True):
            whole = tokens[: tokens.index(-1)] if -1 in tokens else tokens
            if len(whole) < steps:
                self.paused = True
                del self.lines[row.slot]  # it has ids of draws that do not count
            else:
                self.lines[row.slot] = row, len(row.ids) + steps
            result.append(whole)
        return result

    # -- before a burst

    def _reserve(self, rows: Sequence[Running]) -> int:
        """Gives the rows pages for a burst; returns its steps, fewer than usual where pages or texts come to an end."""
        steps = min(self.steps, max(row.limit - len(row.ids) for row in rows))

        def missing() -> list[int]:
            ends = [min(len(row.ids) + steps - 1, row.limit - 1) for row in rows]
            return [max(0, self.cache.pages_for(end) - len(row.pages)) for row, end in zip(rows, ends, strict=True)]

        while sum(missing()) > len(self.cache.free):
            steps -= 1
        assert steps > 0, "a row has no page for its newest token"
        for row, count in zip(rows, missing(), strict=True):
            row.pages += [self.cache.take() for _ in range(count)]
        return steps

    def _load(self, rows: Sequence[Running], size: int) -> None:
        """The rows' state into the buffers; the rest of the bucket stands still."""
        clear, bits, ints, floats, table = [], [], [], [], []
        for row in rows:
            owner, known = self.lines.get(row.slot, (None, 0))
            if owner is not row:
                clear.append(row.slot)
            new = row.distinct if owner is not row else row.ids[known:]
            bits += [row.slot * self.width + token for token in new]
            self.lines[row.slot] = row, len(row.ids)
            s, written = row.request.sampling, len(row.ids) - row.prompt_tokens
            seed = ((row.request.seed & 0xFFFFFFFFFFFFFFFF) ^ 1 << 63) - (1 << 63)  # the low 64 bits, as int64 has them
            # A text ends when it has `limit` tokens, so the last that is ever computed is the one before the last.
            state = row.ids[-1], len(row.ids) - 1, row.limit - 1, written
            ints.append((*state, s.min_new_tokens, seed, s.top_k, row.slot))
            floats.append((s.temperature, s.top_p, s.repetition_penalty))
            table.append(row.pages + [-1] * (self.table.shape[1] - len(row.pages)))
        excess = size - len(rows)
        ints += [(0, 0, 0, 0, 0, 0, 1, self.rows)] * excess
        floats += [(0.0, 1.0, 1.0)] * excess
        table += [[-1] * self.table.shape[1]] * excess
        self.ints[:, :size].copy_(torch.tensor(ints).T)
        self.floats[:, :size].copy_(torch.tensor(floats).T)
        self.table[:size].copy_(torch.tensor(table, dtype=torch.int32))
        self.step.zero_()
        if clear:
            self.seen.index_fill_(0, torch.tensor(clear, device=self.device), False)
        if bits:
            self.seen.view(-1).index_fill_(0, torch.tensor(bits, device=self.device), True)

    def _capture(self, size: int) -> Callable[[], None]:
        """A call that runs one step for that many rows: the replay of a graph, or the step itself."""
        replay = partial(self._step, size)
        if not self.eager:
            self._load([], size)  # warm-up and capture compute rows in excess only: they touch nothing of a text
            try:
                replay = self._graph(size).replay
            except RuntimeError as error:
                self.eager = f"capturing it failed ({str(error).splitlines()[0]})"
                self._say()
        self.replays[size] = replay
        return replay

    def _graph(self, size: int) -> torch.cuda.CUDAGraph:
        """Two steps on a side stream compile what has to be compiled; the third is captured."""
        stream, now = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(now)
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step.zero_()
                self._step(size)
        now.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self._step(size)
        self.pool = graph.pool()
        return graph

    def _say(self) -> None:
        self.notes.append(f"decoding steps are started one by one, not as CUDA graphs: {self.eager}")

    # -- one step, on the device alone: no host read, and no shape that depends on data

    def _step(self, size: int) -> None:
        token, position, end, written, least, seeds, top_k, line = self.ints[:, :size]
        temperature, top_p, penalty = self.floats[:, :size]
        table, S = self.table[:size], self.cache.page_tokens

        # 1) the forward pass over the newest tokens
        active = position < end
        page = table.gather(1, (position // S).clamp(max=table.shape[1] - 1)[:, None])[:, 0]
        slots = torch.where(active, page * S + position % S, -1).int()
        lengths = torch.where(active, position + 1, 0).int()
        batch = walk.Batch(self.cache, slots, table, lengths, size)
        logits = self.hook.forward(batch, token, position, self.every[:size]).float()

        # 2) what must not be drawn, and the repetition penalty: sampler._draw and draw.penalise
        logits[:, self.vocabulary :].fill_(float("-inf"))
        ends = logits.index_select(1, self.ends).masked_fill((written < least)[:, None], float("-inf"))
        logits.index_copy_(1, self.ends, ends)
        factor = penalty[:, None]
        changed = torch.where(logits > 0, logits / factor, logits * factor)
        logits = torch.where(self.seen.index_select(0, line), changed, logits)

        # 3) the draw: draw.draw without its rare path
        greedy = (temperature < 1e-5) | (top_k == 1)
        values, ids = top_candidates(logits)
        scores, kept, whole = keep(values, temperature, top_k, top_p)
        drawn = ids.gather(1, race(scores, kept, ids, seeds, written))[:, 0]
        drawn = torch.where(greedy, logits.argmax(-1), drawn)
        if values.shape[1] < self.width:
            short = active & ~whole & ~greedy
        else:
            short = torch.zeros_like(active)

        # 4) the next step's input
        self.out[:, :size].index_copy_(0, self.step, torch.where(short, -1, drawn)[None])
        self.seen.view(-1).index_fill_(0, line * self.width + drawn, True)
        token.copy_(drawn)
        position += 1
        written += 1
        self.step += 1
