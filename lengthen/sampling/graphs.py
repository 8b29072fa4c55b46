"""Decoding on a GPU without the host: one step as a CUDA graph, replayed several times before its tokens are read.

A step of a small batch is hundreds of kernels of a few microseconds each; started one by one from Python they take
longer than reading the weights. So the whole step (forward pass, repetition penalty, top-k, top-p, draw, and the
bookkeeping for the next one) is captured once per batch size and replayed:

1. Everything a step reads or writes lies in static buffers: per row the newest token, its position, where the text must
   end, seed and sampling parameters; the block tables; which ids the penalty applies to, as a mask per row.
2. A step advances them itself: the drawn token becomes the next input, positions and lengths grow by one, the id joins
   the mask, the slot of the next key follows from the block table. Pages for all steps of a burst are taken beforehand.
3. After a burst of STEPS replays the host reads [STEPS, rows] token ids at once and cuts each text where it ends. A
   row whose text ended in the middle has gone on harmlessly; one that reached its limit has stood still.
   The next burst is launched before the tokens of this one are looked at: the device works while the host decodes text
   and looks for stop strings. Rows that turn out to have ended go on once more for nothing, then stand still.
4. Batch sizes are rounded up to a bucket; the rows in excess have length 0: they store nothing, read no page, and their
   draws are dropped.
5. Draft tokens are verified by one replay of a step with 2, 4 or 8 tokens a row. It draws after each of them, with the
   drafts before it in the penalty's mask, and changes no buffer: the host, which made the drafts, decides what counts.

The draws are those of sampling/draw.py, with one exception that the device can see: more than CANDIDATES ids that tie
at the edge of top-k. Such a draw is marked, the row is cut before it, and the caller's next step (which may look at the
whole vocabulary) makes it. What the rows of a burst ask for decides which step is captured, as each costs what it has
to do:

    "all"      greedy rows, and rows without top-k and top-p: a winner of all tokens, in the pass that penalises them
    "ranked"   also a top-k below CANDIDATES: the candidates are found and ranked
    "wide"     also top-p without top-k, or a large top-k: an exact threshold, and a second pass

Without a GPU, or where a model cannot be captured, the same step runs eagerly on the same buffers, and that is said.
No GPU has run this yet: on a CPU it is proven up to the capture itself (tests/test_graphs.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.sampling_tail import END, NEVER, Noise, Rules, draw_above, lowest, tail
from lengthen.errors import out_of_memory
from lengthen.models.upload import pinned, upload
from lengthen.sampling.attend import QUERIES, TableBatch
from lengthen.sampling.cache import PagedCache
from lengthen.sampling.draw import CANDIDATES, GREEDY, is_free, keep, race, signed, top_candidates
from lengthen.sampling.hook import Hook
from lengthen.sampling.scheduler import Row

STEPS = 8  # per host read: of a text that ends in the middle, 3.5 tokens are computed for nothing on average
BROKEN: list[Any] = []  # graphs whose capture failed: torch's allocator of pinned memory still points at them
DRAWS = 64  # of a captured verification, at least: as many logits as may be needed where rows are few


class Shape(NamedTuple):
    """What a captured step computes; see the module for `draws`."""

    rows: int  # of the bucket
    queries: int  # tokens of a row: 1, more with drafts
    draws: str


@dataclass
class Burst:
    """Steps that were given to the device."""

    rows: list[Row]  # whose tokens count: they run until the burst is read, or are in `dropped`
    slots: list[int]  # in the order of the buffers; also of rows that had ended
    shape: Shape
    steps: int
    tokens: Tensor  # [steps, rows * queries] on the host, valid once `done` is
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
        cache: PagedCache,
        *,
        rows: int,
        context: int,
        unknown: Tensor,
        eos_ids: set[int],
        notes: list[str],
    ):
        self.hook, self.cache, self.rows = hook, cache, rows
        self.device = cache.device
        self.width = hook.model.config.get_text_config().vocab_size  # of the logits
        self.draws = max(rows, DRAWS)  # of a step
        new = partial(torch.zeros, device=self.device)
        # token, position, end, written, least, seed, top_k, line: see _step
        self.ints = new(8, self.draws, dtype=torch.long)
        self.floats = new(3, self.draws)  # temperature, top_p, penalty
        self.table = new(rows, cache.pages_for(context), dtype=torch.int32)
        self.seen = new(rows + 1, self.width, dtype=torch.bool)  # the last is that of rows in excess
        self.out, self.step = new(STEPS, self.draws, dtype=torch.long), new(1, dtype=torch.long)
        self.every = torch.arange(self.draws, device=self.device)
        kinds = torch.zeros(self.width, dtype=torch.uint8)
        kinds[torch.tensor(sorted(eos_ids), dtype=torch.long)], kinds[unknown.cpu()] = END, NEVER
        self.kinds = kinds.to(self.device)  # of ids: what may be drawn
        self.marked: dict[int, tuple[Row, int]] = {}  # slot -> whose ids, and how many of them, its mask has
        self.replays: dict[Shape, Callable[[], None]] = {}
        self.pool: Any = None  # of the memory that all graphs use in turn
        self.stream: torch.cuda.Stream  # on which they are captured
        self.in_flight: Burst | None = None
        self.paused, self.notes = False, notes
        self.eager = "" if self.device.type == "cuda" else "there is no GPU"
        if self.eager:
            self._say()

    def serves(self, rows: Sequence[Row]) -> bool:
        """Whether `run` may be called now: not right after a draw that it left out, nor with more drafts than fit."""
        paused, self.paused = self.paused, False
        return bool(rows) and not paused and self._bucket(len(rows)) * queries_of(rows) <= self.draws

    @torch.no_grad()
    def run(self, rows: Sequence[Row], ahead: bool = False) -> list[list[int]]:
        """The next tokens of each row, as many as there were steps; fewer where a draw was left to the caller.

        With drafts: one step, a token after the newest one and one after each draft.
        Takes pages out of the pool for the rows. The keys and values of all returned tokens but a row's last are in
        its pages. A text that ends among its tokens is the caller's to cut.
        ahead: launch the next burst before returning. While one is `in_flight` the next call must be `run` again, with
        those of its rows that have not ended (or lost their pages): what the device does is ahead of their ids.
        """
        if not self.in_flight:
            self.start(rows)
        burst, self.in_flight = self.in_flight, None
        assert burst
        with self._unread():
            if ahead and not self.paused:
                self.in_flight = self._go_on(burst, rows)
            if burst.done:
                burst.done.synchronize()
            columns = burst.tokens.unflatten(1, (len(burst.slots), -1)).transpose(0, 1)  # [rows, steps, queries]
            drawn = {slot: tokens for slot, tokens in zip(burst.slots, columns.flatten(1).tolist(), strict=True)}
        given = {id(row) for row in rows}
        for row in burst.rows:  # ended, or preempted: what was drawn for it does not count
            if id(row) not in given:
                self._forget(row)
        if burst.shape.queries > 1:  # a row with fewer drafts has its tokens at the end
            drawn = {row.slot: drawn[row.slot][-1 - len(row.draft) :] for row in rows}
        return [self._cut(row, drawn[row.slot], burst) for row in rows]

    @contextmanager
    def _unread(self) -> Iterator[None]:
        """After an error the masks may have ids of draws that nobody has read."""
        try:
            yield
        except BaseException:
            self.in_flight = None
            self.marked.clear()
            raise

    def _forget(self, row: Row) -> None:
        """The mask of ids is not this row's any more."""
        for slot in [slot for slot, (owner, _) in self.marked.items() if owner is row]:
            del self.marked[slot]

    def _cut(self, row: Row, tokens: list[int], burst: Burst) -> list[int]:
        """A row's tokens before a draw that was left out; from there on nothing counts, also in the next burst."""
        if row.slot in burst.dropped:
            tokens = [-1]
        if -1 not in tokens:
            return tokens
        self.paused = True
        self._forget(row)
        if self.in_flight:
            self.in_flight.dropped.add(row.slot)
        return tokens[: tokens.index(-1)]

    # -- bursts

    def start(self, rows: Sequence[Row]) -> None:
        """Launches a burst for rows whose ids the host has; with drafts, their verification."""
        queries = queries_of(rows)
        steps = 1 if queries > 1 else self._reserve(rows, 0)
        assert steps > 0, "a row has no page for its newest token"
        shape = Shape(self._bucket(len(rows)), queries, self._draws(rows))
        with self._unread():
            if shape not in self.replays:
                self._capture(shape)
            self._load(rows, shape)
            self.in_flight = self._launch(rows, [row.slot for row in rows], shape, steps)

    def _draws(self, rows: Sequence[Row]) -> str:
        """What the rows' draws need: see the module."""
        kinds = set()
        for s in (row.request.sampling for row in rows):
            if s.temperature < GREEDY or s.top_k == 1 or s.top_k == 0 and s.top_p >= 1:
                kinds.add("all")
            else:
                kinds.add("wide" if s.top_k == 0 or s.top_k >= CANDIDATES else "ranked")
        if self.width <= CANDIDATES:  # all ids are candidates
            kinds -= {"wide"}
        return "wide" if "wide" in kinds else "all" if kinds == {"all"} else "ranked"

    def _go_on(self, burst: Burst, rows: Sequence[Row]) -> Burst | None:
        """The burst after one whose tokens the host has not seen; None if it must see them first.

        The state is on the device. Only the pages are new, and the rows of `burst` that are not in `rows` stand still:
        their pages may be somebody else's from here on.
        """
        # Too few rows are left for this bucket: the host sees their tokens first and starts a smaller one. After
        # drafts the device does not know which of them were right.
        wait = not rows or self._bucket(len(rows)) < burst.shape.rows or burst.shape.queries > 1
        steps = 0 if wait else self._reserve(rows, burst.steps)
        if not steps:
            return None
        alive = {row.slot: row for row in rows}
        ends = [alive[slot].limit - 1 if slot in alive else 0 for slot in burst.slots]
        self._upload(self.ints[2, : len(ends)], ends)
        self._upload(self.table[: len(ends)], [self._padded(alive.get(slot)) for slot in burst.slots])
        return self._launch(rows, burst.slots, burst.shape, steps)

    def _launch(self, rows: Sequence[Row], slots: list[int], shape: Shape, steps: int) -> Burst:
        """Queues the steps and the copy of their tokens."""
        self.step.zero_()
        for row in rows if shape.queries == 1 else ():
            self.marked[row.slot] = row, self.marked[row.slot][1] + steps
        for _ in range(steps):
            self.replays[shape]()
        drawn, done = self.out[:steps, : len(slots) * shape.queries], None
        if drawn.is_cuda:  # into pinned memory, or the copy would wait for the device
            tokens = torch.empty(drawn.shape, dtype=torch.long, pin_memory=True)
            tokens.copy_(drawn, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        else:
            tokens = drawn.clone()
        return Burst(list(rows), slots, shape, steps, tokens, done)

    def _bucket(self, rows: int) -> int:
        return next(size for size in buckets(self.rows) if size >= rows)

    def _padded(self, row: Row | None) -> list[int]:
        """The row's block table, filled up."""
        pages = row.pages if row else []
        return pages + [-1] * (self.table.shape[1] - len(pages))

    def _upload(self, target: Tensor, values: list) -> None:
        """Queued after what runs, without waiting for it."""
        target.copy_(pinned(values, target.dtype, target.device), non_blocking=True)

    def _reserve(self, rows: Sequence[Row], ahead: int) -> int:
        """Gives the rows pages for a burst that begins `ahead` tokens after their ids; returns its steps, fewer than
        usual where pages or texts come to an end."""
        steps = max(0, min(STEPS, max(row.limit - len(row.ids) - ahead for row in rows)))

        def missing() -> list[int]:
            ends = [min(len(row.ids) + ahead + steps - 1, row.limit - 1) for row in rows]
            return [max(0, self.cache.pages_for(end) - len(row.pages)) for row, end in zip(rows, ends, strict=True)]

        # Nobody is preempted, no prefix forgotten for a burst: with fewer pages it is shorter.
        while steps and sum(missing()) > len(self.cache.free):
            steps -= 1
        for row, count in zip(rows, missing() if steps else [], strict=False):
            row.pages += [self.cache.take() for _ in range(count)]
        return steps

    def _load(self, rows: Sequence[Row], shape: Shape) -> None:
        """The rows' state into the buffers; the rest of the bucket stands still."""
        clear, bits, ints, floats, table = [], [], [], [], []
        for row in rows:
            owner, known = self.marked.get(row.slot, (None, 0))
            if owner is not row:
                clear.append(row.slot)  # another text used this mask
            new = row.distinct if owner is not row else row.ids[known:]
            bits += [row.slot * self.width + token for token in new]
            self.marked[row.slot] = row, len(row.ids)
            s, tokens = row.request.sampling, [row.ids[-1], *row.draft]
            # A text ends when it has `limit` tokens, so the last that is ever computed is the one before the last.
            end, first = row.limit - 1, shape.queries - len(tokens)
            for i in range(shape.queries):  # a row with fewer drafts repeats its newest token in front, standing still
                nth = max(0, i - first)
                state = tokens[nth], len(row.ids) - 1 + nth, end if i >= first else 0, row.written + nth
                ints.append((*state, s.min_new_tokens, signed(row.request.seed), s.top_k, row.slot))
                floats.append((s.temperature, s.top_p, s.repetition_penalty))
            table.append(self._padded(row))
        excess = shape.rows - len(rows)  # lines of the bucket without a row
        ints += [(0, 0, 0, 0, 0, 0, 1, self.rows)] * excess * shape.queries
        floats += [(0.0, 1.0, 1.0)] * excess * shape.queries
        table += [self._padded(None)] * excess
        self._upload(self.ints[:, : len(ints)], list(zip(*ints, strict=True)))
        self._upload(self.floats[:, : len(ints)], list(zip(*floats, strict=True)))
        self._upload(self.table[: shape.rows], table)
        for lines, mask, on in ((clear, self.seen, False), (bits, self.seen.view(-1), True)):
            if lines:
                mask.index_fill_(0, upload(lines, torch.long, self.device), on)

    # -- capture

    def _capture(self, shape: Shape) -> None:
        """Makes the call that runs one step of that shape: the replay of a graph, or the step itself."""
        self.replays[shape] = partial(self._step, shape)
        if not self.eager:
            self._load([], shape)  # warm-up and capture compute rows in excess only: they touch nothing of a text
            try:
                self.replays[shape] = self._graph(shape).replay
            except RuntimeError as error:
                chain: list[BaseException] = [error]  # back to what broke the capture
                while before := chain[-1].__context__:
                    chain.append(before)
                if lack := [one for one in chain if out_of_memory(one)]:
                    del self.replays[shape]  # the caller gives up rows, and this may be captured then
                    raise lack[0] from None
                self.eager = f"capturing it failed ({str(chain[-1]).splitlines()[0]})"
                self._say()

    def _graph(self, shape: Shape) -> torch.cuda.CUDAGraph:
        # Graphs run one at a time, and are captured on one stream: they may share their memory.
        if self.pool is None:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)
        return capture(partial(self._step, shape), self.step.zero_, self.pool, self.stream)

    def _say(self) -> None:
        self.notes.append(f"decoding steps are started one by one, not as CUDA graphs: {self.eager}")

    # -- one step, on the device alone: no host read, and no shape that depends on data

    def _step(self, shape: Shape) -> None:
        n, Q = shape.rows * shape.queries, shape.queries
        token, position, end, written, least, seeds, top_k, line = self.ints[:, :n]
        temperature, top_p, penalty = self.floats[:, :n]
        table, S = self.table[: shape.rows], self.cache.page_tokens

        # 1) the forward pass over the newest tokens, and drafts
        active = position < end  # a row at its limit, or in excess, stands still
        places = position.view(-1, Q)  # [rows, Q]
        page = table.gather(1, (places // S).clamp(max=table.shape[1] - 1)).view(-1)
        slots = torch.where(active, page * S + position % S, -1).int()
        lengths = torch.where(active, position + 1, 0).view(-1, Q).amax(1).int()  # keys, the new ones included
        batch = TableBatch(self.cache.layers, slots, table, lengths, n)
        logits = self.hook.forward(batch, token, position, self.every[:n])

        # 2) what must not be drawn, the repetition penalty, and the winner of all
        drafts = torch.where(places > places[:, :1], token.view(-1, Q), -1) if Q > 1 else None
        rules = Rules(self.kinds, written < least, self.seen, line, penalty, drafts)
        noise = Noise(temperature, seeds, written)
        free = is_free(temperature, top_k, top_p)
        tokens, finite, logits, maxima = tail(logits, rules, noise, free, shape.draws != "all")
        short = active & ~finite  # `Drawer` draws it again, and says what is wrong

        # 3) the draws that have to rank: draw.draw without its rare path
        if shape.draws != "all":
            values, ids = top_candidates(logits, maxima)  # [n, C] each
            scores, kept, whole = keep(values, temperature, top_k, top_p)
            ranked = (temperature >= GREEDY) & (top_k != 1) & ~free
            drawn = ids.gather(1, race(scores, kept, ids, seeds, written))[:, 0]
            if shape.draws == "wide":
                wide = ranked & ((top_k == 0) | (top_k >= CANDIDATES))
                floors = lowest(logits, temperature, top_k, top_p, wide)
                drawn, whole = torch.where(wide, draw_above(logits, floors, noise, wide), drawn), whole | wide
            tokens = torch.where(ranked, drawn, tokens)
            if values.shape[1] < self.width:
                short |= active & ranked & ~whole

        # 4) the next step's input
        self.out[:, :n].index_copy_(0, self.step, torch.where(short, -1, tokens)[None])
        if Q > 1:  # which draws count, the host knows
            return
        self.seen.view(-1).index_fill_(0, line * self.width + tokens, True)
        token.copy_(tokens)  # in place: a view of the buffer
        position += active  # of the token just drawn; a row that stands still must not climb past the context
        written += active  # its place in the output: what the noise is hashed from
        self.step += 1


def queries_of(rows: Sequence[Row]) -> int:
    """Tokens a row that a step for them computes: 1, or as many as hold the longest draft."""
    return next(n for n in QUERIES if n > max(len(row.draft) for row in rows))


def capture(step: Callable, reset: Callable, pool: Any, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """`step` as a graph. It runs twice before, which compiles what has to be compiled, each time after `reset`.

    RuntimeError where it cannot be captured. torch's stream, pools of device memory and settings are then as they
    were; its allocator of pinned memory goes on pointing at the graph, which is kept (BROKEN).
    """
    now, graph = torch.cuda.current_stream(stream.device), torch.cuda.CUDAGraph()
    stream.wait_stream(now)
    try:
        with torch.cuda.stream(stream):
            reset()
            step()
            reset()
            with host_reads_forbidden():  # a capture does not survive them
                step()
            torch.cuda.synchronize(stream.device)
            torch.cuda.empty_cache()  # what the two steps leave behind belongs to this stream
            with capturing(graph, pool, stream.device):
                step()
    finally:
        now.wait_stream(stream)  # also after an error: what was launched goes on writing to the buffers
    return graph


@contextmanager
def host_reads_forbidden() -> Iterator[None]:
    """A RuntimeError where torch would wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> Iterator[None]:
    """Captures what is launched inside. A capture that fails gives up its claim on `pool`.

    torch's own context manager does not do that, and leaves the stream current: memory would go on coming from the
    pool, and the next torch.cuda.empty_cache() would fail an internal assertion.
    """
    try:
        graph.capture_begin(pool=pool)
        try:
            yield
        finally:
            graph.capture_end()
    except BaseException:
        BROKEN.append(graph)
        with suppress(RuntimeError):  # where the capture's own end has done it
            torch._C._cuda_endAllocateToPool(device.index or 0, pool)
            torch._C._cuda_releasePool(device.index or 0, pool)
        raise
