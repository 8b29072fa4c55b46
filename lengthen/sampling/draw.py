"""From logits to a token, as Hugging Face's processors and vLLM have it, for many rows at once and without a generator.

fp32 logits, repetition penalty over distinct ids, temperature, top-k (ties at the edge stay), top-p, draw. The draw is
the argmax of logits plus Gumbel noise, which follows softmax(logits) exactly; the noise is a hash of (seed, position,
token id), so a row's token does not depend on which rows are beside it. Temperature 0 or top-k 1 is greedy.

`Drawer` does it for rows of the scheduler and keeps the table of ids that the penalty applies to; the functions below
it do the arithmetic, with kernels/sampling_tail.py, and sampling/graphs.py does the same on a GPU alone.

n rows, V vocabulary, W distinct ids seen, C candidates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.sampling_tail import COLDEST, COLUMN, Noise, draw_above, gumbel, lowest
from lengthen.sampling.scheduler import Row

CANDIDATES = COLUMN  # highest logits looked at for a draw; top-k from this on (or off) looks at the whole vocabulary
COLUMNS = 256  # distinct ids per row that the penalty table begins with; it doubles when a text has more
GREEDY = COLDEST  # temperatures below it are 0, as in vLLM
NOT_FINITE = -1  # drawn where a logit is NaN or +inf, or all are -inf


class Drawer:
    """Draws the next tokens of rows, and holds the penalty table: `seen` [slots, W] int64, a line of ids per slot.

    `unknown`: int64 ids that are never drawn, because the tokenizer does not know them.
    """

    def __init__(self, slots: int, unknown: Tensor, eos_ids: set[int], device: torch.device):
        self.unknown, self.eos_ids, self.device = unknown.to(device), sorted(eos_ids), device
        self.seen = torch.zeros(slots, COLUMNS, dtype=torch.long, device=device)
        self.owners: list[Row | None] = [None] * slots  # whose ids a line has

    def draw(self, draws: Sequence[tuple[Row, int]], logits: Tensor) -> list[int]:
        """A token for each (row, drafts before it) from its logits [n, V] fp32, changed in place. A row's are in order.

        NOT_FINITE where the logits are not. One read of the device, at the end.
        """
        logits.index_fill_(1, self.unknown, float("-inf"))  # [n, V]
        settings, counts = [row.request.sampling for row, _ in draws], self._update(draws)
        as_floats = torch.tensor([(s.temperature, s.top_p, s.repetition_penalty) for s in settings], device=self.device)
        as_ints = torch.tensor(
            [
                (s.top_k, signed(row.request.seed), row.written + drafts, count, row.slot)
                for (row, drafts), s, count in zip(draws, settings, counts, strict=True)
            ],
            device=self.device,
        )
        (temperature, top_p, penalty), (top_k, seeds, positions, valid, slots) = as_floats.T, as_ints.T
        if early := [i for i, (row, drafts) in enumerate(draws) if too_early(row, drafts)]:
            ends = torch.tensor(self.eos_ids, device=self.device)
            logits[torch.tensor(early, device=self.device)[:, None], ends] = float("-inf")
        if any(s.repetition_penalty != 1 for s in settings):
            penalise(logits, self.seen[slots, : max(1, *counts)], valid, penalty)
        return draw(logits, temperature, top_k, top_p, seeds, positions).tolist()

    def _update(self, draws: Sequence[tuple[Row, int]]) -> list[int]:
        """Brings the rows' lines up to date; returns how many ids the penalty applies to at each draw.

        A line goes on with the draft's new ids, in order: those that are then drawn are in their place, others are
        written over.
        """
        counts = []
        writes: list[tuple[int, int, int]] = []  # (slot, column, id)
        for row, drafts in draws:
            if not drafts:
                if self.owners[row.slot] is not row:
                    self._write_line(row)
                new = row.unwritten  # drawn since the last time, then what the draft adds
                first, row.unwritten = len(row.distinct) - len(new), []
                writes += [(row.slot, first + i, token) for i, token in enumerate(new)]
            elif row.draft[drafts - 1] not in row.distinct and row.draft[drafts - 1] not in new:
                writes.append((row.slot, first + len(new), row.draft[drafts - 1]))
                new.append(row.draft[drafts - 1])
            counts.append(first + len(new))
        self._widen(max(counts))
        if writes:
            slots, columns, tokens = torch.tensor(writes, device=self.device).T
            self.seen[slots, columns] = tokens  # one write for all rows
        return counts

    def _write_line(self, row: Row) -> None:
        """All of a row's distinct ids, into a line that was another's."""
        if row in self.owners:  # its line before a preemption, which misses what is drawn from here on
            self.owners[self.owners.index(row)] = None
        ids = sorted(row.distinct)  # any order does: the penalty is the same for all
        row.unwritten = []
        self._widen(len(ids))
        self.seen[row.slot, : len(ids)] = torch.tensor(ids, dtype=torch.long, device=self.device)
        self.owners[row.slot] = row

    def _widen(self, columns: int) -> None:
        while columns > self.seen.shape[1]:
            self.seen = torch.cat([self.seen, torch.zeros_like(self.seen)], 1)  # doubled: rare


def too_early(row: Row, drafts: int) -> bool:
    """Whether the text must not end yet, `drafts` tokens further on."""
    return row.written + drafts < row.request.sampling.min_new_tokens


def signed(seed: int) -> int:
    """The low 64 bits of an integer, as int64 has them."""
    return ((seed & 0xFFFFFFFFFFFFFFFF) ^ 1 << 63) - (1 << 63)


# ---------------------------------------------------------------------------------------------------------
# The arithmetic


def penalise(logits: Tensor, seen: Tensor, counts: Tensor, penalty: Tensor) -> None:
    """Repetition penalty, in place: logits [n, V] fp32, seen [n, W] ids, of which the first counts [n] are valid.

    They are distinct. Whatever stands after them counts as the row's first one: the same value is written again.
    """
    valid = torch.arange(seen.shape[1], device=seen.device) < counts[:, None]
    seen = torch.where(valid, seen, seen[:, :1])
    values = logits.gather(1, seen)  # [n, W]
    factor = penalty[:, None]  # [n, 1]
    changed = torch.where(values > 0, values / factor, values * factor)
    logits.scatter_(1, seen, torch.where(counts[:, None] > 0, changed, values))


def top_candidates(logits: Tensor, maxima: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The CANDIDATES highest logits of each row and their ids, descending: [n, C] each. Which of equal ones is open.

    A plain topk over V = 49,152 costs a CPU as much as a tenth of the model. The maxima of V/64 blocks come first:
    the C highest logits lie in the C blocks with the highest maxima. maxima: [n, V/64] of them, where known.
    """
    n, V = logits.shape
    if V % CANDIDATES or V < CANDIDATES**2:
        return logits.topk(min(CANDIDATES, V))
    blocks = logits.view(n, CANDIDATES, V // CANDIDATES)  # block j = ids j, j + V/64, ...: a fast vertical maximum
    columns = (blocks.amax(1) if maxima is None else maxima).topk(CANDIDATES).indices  # [n, C]
    few = blocks.gather(2, columns[:, None].expand(n, CANDIDATES, CANDIDATES)).flatten(1)
    values, index = few.topk(CANDIDATES)
    column, block = index & CANDIDATES - 1, index >> CANDIDATES.bit_length() - 1  # CANDIDATES is a power of two
    return values, columns.gather(1, column) + block * (V // CANDIDATES)


def is_free(temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """bool [n]: any token may be drawn, so that nothing has to be ranked."""
    return (temperature >= GREEDY) & (top_k == 0) & (top_p >= 1)


def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """One token per row, [n] int64, or NOT_FINITE. logits [n, V] fp32, penalised; the others [n], temperature fp32."""
    greedy = (temperature < GREEDY) | (top_k == 1)
    if greedy.all():  # no noise, no ranking
        tokens = logits.argmax(-1)
        return torch.where(logits.gather(1, tokens[:, None])[:, 0].isfinite(), tokens, NOT_FINITE)
    V = logits.shape[1]
    values, ids = top_candidates(logits)
    finite = values[:, 0].isfinite()  # NaN is the highest of all, to argmax and topk
    scores, kept, whole = keep(values, temperature, top_k, top_p)
    short = ~whole & ~greedy & (values.shape[1] < V)  # rows that need more than the candidates
    tokens = ids.gather(1, race(scores, kept, ids, seeds, positions))[:, 0]
    free = is_free(temperature, top_k, top_p)
    for few in short.nonzero()[:, 0].split(32):  # top-k off or very large; rare: more than 64 ties
        rows, noise = logits[few], Noise(temperature[few], seeds[few], positions[few])
        floors = torch.full_like(noise.temperature, float("-inf"))
        if not free[few].all():
            floors = lowest(rows, noise.temperature, top_k[few], top_p[few], ~free[few]).where(~free[few], floors)
        tokens[few] = draw_above(rows, floors, noise, torch.ones_like(few, dtype=torch.bool))
    tokens = torch.where(greedy, logits.argmax(-1), tokens) if greedy.any() else tokens
    return torch.where(finite, tokens, NOT_FINITE)


def keep(values: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k, then top-p, on values [n, C], descending.

    Returns the scores after the temperature, which of them stay, and [n] whether top-k left nothing but candidates:
    not so if the lowest candidate ties with the k-th (or top-k is off), for then others like it were never looked at.
    """
    C = values.shape[1]
    scores = values / temperature.clamp(min=GREEDY)[:, None]  # [n, C]; a greedy row takes the highest anyway
    last = torch.where(top_k == 0, C, top_k).clamp(max=C)[:, None] - 1
    kept = scores >= scores.gather(1, last)  # `>=`: ties at the edge stay
    whole = ~kept[:, -1]
    # Hugging Face sums from the least likely up and removes while the sum is <= 1 - p; the best always stays.
    probabilities = scores.masked_fill(~kept, float("-inf")).softmax(-1)
    tail = probabilities.flip(1).cumsum(1).flip(1)  # of a candidate and all less likely ones
    nucleus = (tail > 1 - top_p[:, None]) | (top_p[:, None] >= 1)
    nucleus[:, 0] = True  # [n, C]
    return scores, kept & nucleus, whole


def race(scores: Tensor, kept: Tensor, ids: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """The Gumbel-max draw from softmax(scores) over the kept: column index [n, 1]."""
    noisy = scores.double() + gumbel(seeds, positions, ids)
    return noisy.masked_fill_(~kept, float("-inf")).argmax(1, keepdim=True)
