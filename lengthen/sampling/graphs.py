"""Decoding on a GPU without the host: one step as a CUDA graph, replayed several times before its tokens are read.

A step of a small batch is hundreds of kernels of a few microseconds each; started one by one from Python they take
longer than reading the weights. So the whole step (forward pass, repetition penalty, top-k, top-p, draw, and the
bookkeeping for the next one) is captured once per batch size and replayed:

1. Everything a step reads or writes lies in static buffers: per row the newest token, its position, where the text must
   end, seed and sampling parameters; the block tables; which ids the penalty applies to, as a mask per row.
2. A step advances them itself: the drawn token becomes the next input, positions and lengths grow by one, the id joins
   the mask, the slot of the next key follows from the block table. Pages for all steps of a burst are taken beforehand.
3. After a burst of `steps` replays the host reads [steps, rows] token ids at once and cuts each text where it ends. A
   row whose text ended in the middle has gone on harmlessly; one that reached its limit has stood still.
   The next burst is launched before the tokens of this one are looked at: the device works while the host decodes text
   and looks for stop strings. Rows that turn out to have ended go on once more for nothing, then stand still.
4. Batch sizes are rounded up to a bucket; the rows in excess have length 0: they store nothing, read no page, and their
   draws are dropped.

The draws are those of sampling/draw.py, bit for bit, with one exception that the device can see: more than CANDIDATES
ids that must be ranked. Such a draw is marked, the row is cut before it, and the caller's next step (which may
look at the whole vocabulary) makes it. Rows whose top-k is off or that large are not served at all.

Without a GPU, or where a model cannot be captured, the same step runs eagerly on the same buffers, and that is said.
No GPU has run this yet: on a CPU it is proven up to the capture itself (tests/test_graphs.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lengthen.sampling.attend_gpu import TableBatch
from lengthen.sampling.cache import BlockTableCache
from lengthen.sampling.draw import CANDIDATES, GREEDY, keep, race, signed, top_candidates
from lengthen.sampling.hook import Hook
from lengthen.sampling.scheduler import Row

STEPS = 8  # per host read: of a text that ends in the middle, 3.5 tokens are computed for nothing on average


@dataclass
class Burst:
    """Steps that were given to the device."""

    slots: list[int]  # of its rows, in the order of the buffers
    size: int  # of the bucket
    steps: int
    tokens: Tensor  # [steps, rows] on the host, valid once `done` is
    done: torch.cuda.Event | None
    dropped: set[int] = field(default_factory=set)  # slots whose tokens do not count


def buckets(rows: int) -> list[int]:
    """Batch sizes that are captured, up to `rows`: dense where a step is short, then every 32."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, *range(96, rows, 32)]
    return [size for size in sizes if size < rows] + [rows]


class DecodeGraphs:
    """Bursts of decoding steps for up to `rows` texts in pages of `cache`.

    `context`: most tokens of a text. `unknown`: int64 ids that are never drawn. `eos_ids` are not drawn before a row's
    `min_new_tokens`. Lines for people are appended to `notes`.
    """

    def __init__(
        self,
        hook: Hook,
        cache: BlockTableCache,
        *,
        rows: int,
        context: int,
        unknown: Tensor,
        eos_ids: set[int],
        notes: list[str],
        steps: int = STEPS,
    ):
        self.hook, self.cache, self.rows, self.steps = hook, cache, rows, steps
        self.device = cache.device
        self.unknown = unknown.to(self.device)
        self.width = hook.model.config.get_text_config().vocab_size  # of the logits
        new = partial(torch.zeros, device=self.device)
        # token, position, end, written, least, seed, top_k, line: see _step
        self.ints = new(8, rows, dtype=torch.long)
        self.floats = new(3, rows)  # temperature, top_p, penalty
        self.table = new(rows, cache.pages_for(context), dtype=torch.int32)
        self.seen = new(rows + 1, self.width, dtype=torch.bool)  # the last is that of rows in excess
        self.out, self.step = new(steps, rows, dtype=torch.long), new(1, dtype=torch.long)
        self.every = torch.arange(rows, device=self.device)
        self.ends = torch.tensor(sorted(eos_ids), dtype=torch.long, device=self.device)
        self.marked: dict[int, tuple[Row, int]] = {}  # slot -> whose ids, and how many of them, its mask has
        self.replays: dict[int, Callable[[], None]] = {}
        self.pool: Any = None  # of the memory that all graphs use in turn
        self.in_flight: Burst | None = None
        self.paused, self.notes = False, notes
        self.eager = "" if self.device.type == "cuda" else "there is no GPU"
        if self.eager:
            self._say()

    def serves(self, rows: Sequence[Row]) -> bool:
        """Whether `run` may be called now: not for rows it cannot draw for, nor right after a draw it left out."""
        paused, self.paused = self.paused, False
        return bool(rows) and not paused and all(map(self._can_draw, rows))

    def _can_draw(self, row: Row) -> bool:
        sampling = row.request.sampling
        return sampling.temperature < GREEDY or 0 < sampling.top_k < CANDIDATES or self.width <= CANDIDATES

    @torch.no_grad()
    def run(self, rows: Sequence[Row], ahead: bool = False) -> list[list[int]]:
        """The next tokens of each row, as many as there were steps; fewer where a draw was left to the caller.

        Takes pages out of the pool for the rows. The keys and values of all returned tokens but a row's last are in
        its pages. A text that ends among its tokens is the caller's to cut.
        ahead: launch the next burst before returning. While one is `in_flight` the next call must be `run` again, with
        those of its rows that have not ended (or lost their pages): what the device does is ahead of their ids.
        """
        try:
            burst, self.in_flight = self.in_flight or self._start(rows), None
            if ahead and not self.paused:
                self.in_flight = self._go_on(burst, rows)
            if burst.done:
                burst.done.synchronize()
            drawn = {slot: tokens for slot, tokens in zip(burst.slots, burst.tokens.T.tolist(), strict=True)}
        except BaseException:
            self.in_flight = None
            self.marked.clear()  # the masks may have ids of draws that nobody has read
            raise
        given = {row.slot for row in rows}
        for slot in drawn.keys() - given:  # ended, or preempted: what was drawn for it does not count
            self.marked.pop(slot, None)
        return [self._cut(row, drawn[row.slot], burst) for row in rows]

    def _cut(self, row: Row, tokens: list[int], burst: Burst) -> list[int]:
        """A row's tokens before a draw that was left out; from there on nothing counts, also in the next burst."""
        if row.slot in burst.dropped:
            tokens = [-1]
        if -1 not in tokens:
            return tokens
        self.paused = True
        self.marked.pop(row.slot, None)
        if self.in_flight:
            self.in_flight.dropped.add(row.slot)
        return tokens[: tokens.index(-1)]

    # -- bursts

    def _start(self, rows: Sequence[Row]) -> Burst:
        """A burst for rows whose ids the host has."""
        steps = self._reserve(rows, 0)
        assert steps > 0, "a row has no page for its newest token"
        size = self._bucket(len(rows))
        if size not in self.replays:
            self._capture(size)
        self._load(rows, size)
        return self._launch(rows, [row.slot for row in rows], size, steps)

    def _go_on(self, burst: Burst, rows: Sequence[Row]) -> Burst | None:
        """The burst after one whose tokens the host has not seen; None if it must see them first.

        The state is on the device. Only the pages are new, and the rows of `burst` that are not in `rows` stand still:
        their pages may be somebody else's from here on.
        """
        # Too few rows are left for this bucket: the host sees their tokens first and starts a smaller one.
        small = not rows or self._bucket(len(rows)) < burst.size
        steps = 0 if small else self._reserve(rows, burst.steps)
        if not steps:
            return None
        alive = {row.slot: row for row in rows}
        ends = [alive[slot].limit - 1 if slot in alive else 0 for slot in burst.slots]
        self._upload(self.ints[2, : len(ends)], ends)
        self._upload(self.table[: len(ends)], [self._padded(alive.get(slot)) for slot in burst.slots])
        return self._launch(rows, burst.slots, burst.size, steps)

    def _launch(self, rows: Sequence[Row], slots: list[int], size: int, steps: int) -> Burst:
        """Queues the steps and the copy of their tokens."""
        self.step.zero_()
        for row in rows:
            self.marked[row.slot] = row, self.marked[row.slot][1] + steps
        for _ in range(steps):
            self.replays[size]()
        drawn, done = self.out[:steps, : len(slots)], None
        if drawn.is_cuda:  # into pinned memory, or the copy would wait for the device
            tokens = torch.empty(drawn.shape, dtype=torch.long, pin_memory=True)
            tokens.copy_(drawn, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        else:
            tokens = drawn.clone()
        return Burst(slots, size, steps, tokens, done)

    def _bucket(self, rows: int) -> int:
        return next(size for size in buckets(self.rows) if size >= rows)

    def _padded(self, row: Row | None) -> list[int]:
        """The row's block table, filled up."""
        pages = row.pages if row else []
        return pages + [-1] * (self.table.shape[1] - len(pages))

    def _upload(self, target: Tensor, values: list) -> None:
        """Queued after what runs, without waiting for it."""
        target.copy_(torch.tensor(values, dtype=target.dtype, pin_memory=target.is_cuda), non_blocking=True)

    def _reserve(self, rows: Sequence[Row], ahead: int) -> int:
        """Gives the rows pages for a burst that begins `ahead` tokens after their ids; returns its steps, fewer than
        usual where pages or texts come to an end."""
        steps = max(0, min(self.steps, max(row.limit - len(row.ids) - ahead for row in rows)))

        def missing() -> list[int]:
            ends = [min(len(row.ids) + ahead + steps - 1, row.limit - 1) for row in rows]
            return [max(0, self.cache.pages_for(end) - len(row.pages)) for row, end in zip(rows, ends, strict=True)]

        # Nobody is preempted, no prefix forgotten for a burst: with fewer pages it is shorter.
        while steps and sum(missing()) > len(self.cache.free):
            steps -= 1
        for row, count in zip(rows, missing() if steps else [], strict=False):
            row.pages += [self.cache.take() for _ in range(count)]
        return steps

    def _load(self, rows: Sequence[Row], size: int) -> None:
        """The rows' state into the buffers; the rest of the bucket stands still."""
        clear, bits, ints, floats, table = [], [], [], [], []
        for row in rows:
            owner, known = self.marked.get(row.slot, (None, 0))
            if owner is not row:
                clear.append(row.slot)  # another text used this mask
            new = row.distinct if owner is not row else row.ids[known:]
            bits += [row.slot * self.width + token for token in new]
            self.marked[row.slot] = row, len(row.ids)
            s, written = row.request.sampling, len(row.ids) - row.prompt_tokens
            # A text ends when it has `limit` tokens, so the last that is ever computed is the one before the last.
            state = row.ids[-1], len(row.ids) - 1, row.limit - 1, written
            ints.append((*state, s.min_new_tokens, signed(row.request.seed), s.top_k, row.slot))
            floats.append((s.temperature, s.top_p, s.repetition_penalty))
            table.append(self._padded(row))
        excess = size - len(rows)  # lines of the bucket without a row
        ints += [(0, 0, 0, 0, 0, 0, 1, self.rows)] * excess
        floats += [(0.0, 1.0, 1.0)] * excess
        table += [self._padded(None)] * excess
        self._upload(self.ints[:, :size], list(zip(*ints, strict=True)))
        self._upload(self.floats[:, :size], list(zip(*floats, strict=True)))
        self._upload(self.table[:size], table)
        if clear:
            self.seen.index_fill_(0, torch.tensor(clear, device=self.device), False)
        if bits:
            self.seen.view(-1).index_fill_(0, torch.tensor(bits, device=self.device), True)

    def _capture(self, size: int) -> None:
        """Makes the call that runs one step for that many rows: the replay of a graph, or the step itself."""
        self.replays[size] = partial(self._step, size)
        if not self.eager:
            self._load([], size)  # warm-up and capture compute rows in excess only: they touch nothing of a text
            try:
                self.replays[size] = self._graph(size).replay
            except RuntimeError as error:
                self.eager = f"capturing it failed ({str(error).splitlines()[0]})"
                self._say()

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
        self.pool = graph.pool()  # graphs run one at a time: they may share it
        return graph

    def _say(self) -> None:
        self.notes.append(f"decoding steps are started one by one, not as CUDA graphs: {self.eager}")

    # -- one step, on the device alone: no host read, and no shape that depends on data

    def _step(self, size: int) -> None:
        token, position, end, written, least, seeds, top_k, line = self.ints[:, :size]
        temperature, top_p, penalty = self.floats[:, :size]
        table, S = self.table[:size], self.cache.page_tokens

        # 1) the forward pass over the newest tokens
        active = position < end  # a row at its limit, or in excess, stands still
        page = table.gather(1, (position // S).clamp(max=table.shape[1] - 1)[:, None])[:, 0]
        slots = torch.where(active, page * S + position % S, -1).int()
        lengths = torch.where(active, position + 1, 0).int()  # keys, the new one included
        batch = TableBatch(self.cache.layers, slots, table, lengths, size)  # Q = 1: no drafts
        logits = self.hook.forward(batch, token, position, self.every[:size]).float()

        # 2) what must not be drawn, and the repetition penalty: as draw.Drawer and draw.penalise
        logits.index_fill_(1, self.unknown, float("-inf"))
        ends = logits.index_select(1, self.ends).masked_fill((written < least)[:, None], float("-inf"))
        logits.index_copy_(1, self.ends, ends)
        factor = penalty[:, None]  # [size, 1]
        changed = torch.where(logits > 0, logits / factor, logits * factor)
        logits = torch.where(self.seen.index_select(0, line), changed, logits)

        # 3) the draw: draw.draw without its rare path
        greedy = (temperature < GREEDY) | (top_k == 1)  # [size]
        values, ids = top_candidates(logits)  # [size, C] each
        scores, kept, whole = keep(values, temperature, top_k, top_p)
        drawn = ids.gather(1, race(scores, kept, ids, seeds, written))[:, 0]
        drawn = torch.where(greedy, logits.argmax(-1), drawn)
        short = active & ~values[:, 0].isfinite()  # `Drawer` draws it again, and says what is wrong
        if values.shape[1] < self.width:
            short |= active & ~whole & ~greedy

        # 4) the next step's input
        self.out[:, :size].index_copy_(0, self.step, torch.where(short, -1, drawn)[None])
        self.seen.view(-1).index_fill_(0, line * self.width + drawn, True)
        token.copy_(drawn)  # in place: a view of the buffer
        position += 1  # of the token just drawn
        written += 1  # its place in the output: what the noise is hashed from
        self.step += 1
