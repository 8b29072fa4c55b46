"""Log-probabilities of given texts: forward passes through the same pages, without a draw."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.linear_cross_entropy import Head, LossStats, linear_cross_entropy
from lengthen.sampling.request import Pairs, Request, check_fits
from lengthen.sampling.scheduler import Row, Scheduler, Step

LOGIT_BYTES = 2**28  # of the fp32 logits of a pass, where the loss kernel does not know the head

# What is computed -> the pairs that read from it: those that differ in their last token only (a judge's yes and no)
# read from one pass over the tokens before it.
Readers = dict[tuple[int, ...], list[int]]


# The engine's forward pass: (step, packed indices, hidden) -> logits [n, V] fp32, or hidden states [n, H].
Forward = Callable[[Step, list[int], bool], Tensor]


class Scores:
    """`head`: what the loss kernel needs of the model's head; None = it does not know it, and whole logits are made."""

    def __init__(self, scheduler: Scheduler, head: Head | None, vocab_size: int, device: torch.device):
        self.scheduler, self.head, self.vocab_size, self.device = scheduler, head, vocab_size, device

    @torch.no_grad()
    def logprobs(self, pairs: Pairs, forward: Forward) -> list[Tensor]:
        """One fp32 tensor [len(continuation)] on the CPU per pair: natural log-probabilities, no penalty, T = 1.

        Takes pages for its texts, which may preempt running rows. Raises UserError for what exceeds the context.
        """
        check_fits(pairs, self.scheduler.context)
        readers: Readers = {}
        for i, (prompt, continuation) in enumerate(pairs):
            assert prompt, "a continuation needs a prompt"
            readers.setdefault(tuple(prompt + continuation)[:-1], []).append(i)
        budget = self.scheduler.prefill_tokens  # tokens of a pass
        if self.head is None:
            budget = max(16, min(budget, LOGIT_BYTES // (4 * self.vocab_size)))
        out = [torch.zeros(len(continuation)) for _, continuation in pairs]
        for group in self._groups(list(readers), budget):
            for row in group:
                self.scheduler.grow(row, len(row.ids))  # there is always room: only rows that run are preempted for it
            while any(row.computed < len(row.ids) for row in group):
                work = [(row, min(len(row.ids) - row.computed, budget)) for row in group]
                step = Step(decode=[x for x in work if x[1] == 1], prefill=[x for x in work if x[1] != 1])
                self._pass(step, readers, pairs, out, forward)
            for row in group:
                self.scheduler.pool.give_back(row.pages)  # given texts are not remembered as prefixes
        return out

    def _groups(self, texts: Sequence[tuple[int, ...]], budget: int) -> list[list[Row]]:
        """Many short texts in one pass, or one long text in several."""
        groups: list[list[Row]] = []
        pool = self.scheduler.pool
        tokens = pages = 0  # of the group so far
        for text in texts:
            tokens, pages = tokens + len(text), pages + pool.pages_for(len(text))
            if not groups or tokens > budget or pages > pool.num_pages:
                groups.append([])
                tokens, pages = len(text), pool.pages_for(len(text))
            groups[-1].append(Row.of(Request(None, list(text), 0), 0, self.scheduler.context, {}))
        return groups

    def _pass(self, step: Step, readers: Readers, pairs: Pairs, out: list[Tensor], forward: Forward) -> None:
        """Computes the step and fills in what the pairs read from it."""
        keep: list[int] = []  # packed indices
        targets: list[tuple[int, int, int]] = []  # for each: (pair, index in its continuation, the token there)
        first = 0
        for row, count in step.work:
            for i in readers[tuple(row.ids)]:
                prompt, continuation = pairs[i]
                for j, token in enumerate(continuation):
                    index = len(prompt) - 1 + j - row.computed  # the token before it predicts it
                    if 0 <= index < count:
                        keep.append(first + index)
                        targets.append((i, j, token))
            first += count  # packed index where the next row begins
        scored = forward(step, keep, self.head is not None)
        if keep:
            tokens = torch.tensor([token for _, _, token in targets], device=self.device)
            for (i, j, _), value in zip(targets, self._values(scored, tokens).tolist(), strict=True):
                out[i][j] = value
        step.mark_computed()

    def _values(self, scored: Tensor, tokens: Tensor) -> Tensor:
        """Log-probabilities fp32 [n] of the tokens int64 [n]."""
        if self.head is None:
            return scored.log_softmax(-1).gather(1, tokens[:, None])[:, 0]  # [n, V] -> [n]
        _, stats = linear_cross_entropy(scored, targets=tokens, return_stats=True, **self.head._asdict())
        assert isinstance(stats, LossStats)
        return stats.logprob
