"""Exercise 4, 60 minutes: continuous batching, in 50 lines.

A batch of texts that end at different times is done when its longest text is, and most of its rows compute nothing for
most of that time. Continuous batching decides anew in every step which texts take part: a finished one gives its place
to the next at once. Keys and values lie in pages, so that a text takes memory as it grows:

    waiting   [c d e]          a queue, the next one first
    running   [a b]            oldest first; at most max_rows
    pages     a: 4 0 7   b: 2  a text of t tokens holds ceil(t / page_tokens) of them

A step computes every running text: in its first step its whole prompt (and what it had written, if it was preempted),
later its newest token; and each draws a token.

The queue and the pages are given; `schedule` is yours:

1. It first admits. It looks at the text at the front of the queue: is a row free, and are there free pages for its
   prompt, for what it has written, and for one token more? If so it runs, and the next one is looked at; if not,
   nothing more is admitted in this step. Admission only counts pages: those that it has promised in this step are not
   free for the next text, and it is item 2 that takes them, without the one token more.
2. Then every running text, oldest first, gets the pages that its tokens need in this step: those for prompt + written.
3. Where no page is free, the youngest running text is preempted: its pages are free again, it keeps what it has
   written, and it goes to the front of the queue. It may be the very text that asked for a page, or one admitted a
   moment ago. The oldest never is, as long as the pool can hold any one text and a token more: so all come to an end.
4. On paper: what goes wrong if the oldest text is preempted instead? And if a preempted text goes to the end of the
   queue?

Leads to: `Scheduler` in lengthen/sampling/scheduler.py, which also cuts prompts into chunks, orders the queue and
admits by expected length, shares prefixes and hands out draft tokens.

    python -m pytest -q exercises/04_scheduler.py
"""

import random
from collections import deque
from dataclasses import dataclass, field

from lengthen.sampling import scheduler as project
from lengthen.sampling.pages import PagePool
from lengthen.sampling.prefix_cache import PrefixCache
from lengthen.sampling.request import Request, Sampling


@dataclass
class Text:
    key: int
    prompt: int  # tokens
    written: int = 0  # tokens drawn so far; in a step, prompt + written of them need a place in the pages
    pages: list[int] = field(default_factory=list)


class Scheduler:
    def __init__(self, max_rows: int, num_pages: int, page_tokens: int):
        self.max_rows, self.page_tokens = max_rows, page_tokens
        self.free = list(range(num_pages))  # pages that nobody holds
        self.waiting: deque[Text] = deque()  # the next one first
        self.running: list[Text] = []  # oldest first

    def add(self, text: Text) -> None:
        self.waiting.append(text)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def finish(self, text: Text) -> None:
        """Takes a running text out: it has ended, or it is preempted. Its pages are free."""
        self.running.remove(text)
        self.free += text.pages
        text.pages.clear()

    def schedule(self) -> list[Text]:
        """The texts of the next step, oldest first, with all their pages; [] when nothing waits or runs."""
        raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------

PAGE_TOKENS = 16


def drive(lengths: list[int], prompts: list[int], max_rows: int, num_pages: int) -> tuple[int, int]:
    """(steps, preemptions) until every text has as many tokens as it should; what must hold is checked in each."""
    scheduler = Scheduler(max_rows, num_pages, PAGE_TOKENS)
    for key, prompt in enumerate(prompts):
        scheduler.add(Text(key, prompt))
    steps, preemptions, finished, last, room, drawn = 0, 0, [], [], num_pages, [0] * len(lengths)
    while texts := scheduler.schedule():
        steps += 1
        held = [page for text in texts for page in text.pages]
        assert len(texts) <= max_rows, "more than max_rows run"
        assert len(held) == len(set(held)), "two texts hold one page"
        assert sorted(held + list(scheduler.free)) == list(range(num_pages)), "a page is lost"
        assert all(text.written == drawn[text.key] for text in texts), "what it has written is lost"
        needed = {text.key: -(-(text.prompt + text.written) // PAGE_TOKENS) for text in texts}
        assert needed == {text.key: len(text.pages) for text in texts}, "pages for prompt + written, no more, no fewer"
        if last:
            assert last[0].key in finished or texts[0] is last[0], "the oldest was preempted"
        assert all(one.key > text.key for one in scheduler.waiting for text in texts), "overtaken"
        new = [text for text in texts if text not in last]
        needed = sum(-(-(text.prompt + text.written + 1) // PAGE_TOKENS) for text in new)
        assert needed <= room, "admitted without pages"
        preemptions += sum(text not in texts for text in last if text.key not in finished)
        last = list(texts)
        for text in last:
            text.written += 1
            drawn[text.key] += 1
            if text.written == lengths[text.key]:
                finished.append(text.key)
                scheduler.finish(text)
        room = len(scheduler.free)
    assert sorted(finished) == list(range(len(lengths))), "schedule() gave [] while texts were left"
    return steps, preemptions


def steps_of_the_project(lengths: list[int], prompts: list[int], max_rows: int) -> int:
    pool = PagePool(10_000, PAGE_TOKENS)
    scheduler = project.Scheduler(
        *(pool, PrefixCache(pool, 0)),
        **{"context": 10_000, "max_rows": max_rows, "prefill_tokens": 100_000},
    )
    for key, prompt in enumerate(prompts):
        ids = [1000 * key + i for i in range(prompt)]
        scheduler.add(Request(key, ids, 0, Sampling(max_new_tokens=1000)))
    steps = 0
    while step := scheduler.schedule():
        steps += 1
        draws, _ = step.draws()
        step.mark_computed()
        for row, _ in draws:
            scheduler.accept(row, [7], lambda row: row.written == lengths[row.request.key])
    return steps


def example(count: int) -> tuple[list[int], list[int]]:
    rng = random.Random(0)
    return [rng.randrange(1, 120) for _ in range(count)], [rng.randrange(1, 60) for _ in range(count)]


def keys(texts) -> list[int]:
    return [text.key for text in texts]


def test_one_token_more_must_fit():
    """Two prompts of a page each: with the token that each will draw, both need two pages."""
    for num_pages, admitted in ((3, [0]), (4, [0, 1])):
        scheduler = Scheduler(2, num_pages, PAGE_TOKENS)
        scheduler.add(Text(0, PAGE_TOKENS))
        scheduler.add(Text(1, PAGE_TOKENS))
        assert keys(scheduler.schedule()) == admitted


def test_no_more_are_preempted_than_must_be():
    """In the third step the first text needs a second page, which the last one gives."""
    scheduler = Scheduler(3, 3, PAGE_TOKENS)
    texts = [Text(0, PAGE_TOKENS - 1), Text(1, 1), Text(2, 1)]
    for text in texts:
        scheduler.add(text)
    for running in ([0, 1, 2], [0, 1, 2], [0, 1]):
        assert keys(scheduler.schedule()) == running
        for key in running:
            texts[key].written += 1
    assert keys(scheduler.waiting) == [2] and texts[2].written == 2
    scheduler.finish(texts[0])
    assert keys(scheduler.schedule()) == [1, 2]


def test_it_takes_as_many_steps_as_the_project():
    lengths, prompts = example(60)
    for max_rows in (1, 4, 16):
        steps, preemptions = drive(lengths, prompts, max_rows, num_pages=1000)
        assert steps == steps_of_the_project(lengths, prompts, max_rows) and not preemptions


def test_it_takes_fewer_steps_than_whole_batches():
    lengths, prompts = example(60)
    whole = sum(max(lengths[i : i + 8]) for i in range(0, 60, 8))
    assert drive(lengths, prompts, 8, num_pages=1000)[0] < 0.75 * whole


def test_all_texts_end_where_pages_are_few():
    lengths, prompts = example(60)
    pages = -(-(120 + 60) // PAGE_TOKENS) + 1  # room for the longest text, and hardly more
    assert drive(lengths, prompts, 8, pages)[1] > 0
