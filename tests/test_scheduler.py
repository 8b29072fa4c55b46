"""The scheduler without a model: an engine that computes nothing, and what must hold after every step of it.

python -m pytest -q tests/test_scheduler.py
"""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lengthen.sampling.lookup import DraftCosts
from lengthen.sampling.pages import PagePool
from lengthen.sampling.prefix_cache import PrefixCache
from lengthen.sampling.request import Request, Sampling
from lengthen.sampling.scheduler import LEAST_CHUNK, WORTH_WAITING, Row, Scheduler, Step

CONTEXT = 256  # tokens


def make(pages: int = 64, room: int = 8, drafts: bool = False, **sizes) -> Scheduler:
    """Pages of 16 tokens; `room` of them at most for prefixes."""
    page_tokens = 16
    pool = PagePool(pages, page_tokens)
    sizes = {"context": CONTEXT, "max_rows": 8, "prefill_tokens": 64, **sizes}
    return Scheduler(pool, PrefixCache(pool, room), drafts=DraftCosts(24, 0.0) if drafts else None, **sizes)


def token_of(row: Row, drafts: int = 0) -> int:
    """What the fake engine draws next: the text repeats itself every 9 tokens, so that drafts can be right."""
    return 100 + (row.order + (row.written + drafts) % 9) % 50


def advance(scheduler: Scheduler, step: Step, lengths: dict[int, int]) -> list[Row]:
    """The engine's part of a step: a token for each draw. Texts end at lengths[key]; returns those that did."""
    draws, keep = step.draws()
    assert len(keep) == len(draws) and keep == sorted(set(keep))
    tokens = [token_of(row, drafts) for row, drafts in draws]
    step.mark_computed()
    finished = []
    for i, (row, drafts) in enumerate(draws):
        if not drafts:
            drawn = tokens[i : i + 1 + len(row.draft)]
            if scheduler.accept(row, drawn, lambda row: row.written >= lengths[row.request.key]):
                finished.append(row)
    return finished


def drive(scheduler: Scheduler, lengths: dict[int, int]) -> Iterator[tuple[Step, list[Row]]]:
    while step := scheduler.schedule():
        yield step, advance(scheduler, step, lengths)


def check(scheduler: Scheduler, step: Step) -> None:
    """No page is lost, held twice by mistake, or written to by two; no row computes beyond its pages."""
    pool = scheduler.pool
    tree = tree_pages(scheduler)
    holders = [int(page in tree) for page in range(pool.num_pages)]
    for row in scheduler.rows:
        assert row.slot >= 0 and row.computed <= min(len(row.ids), pool.page_tokens * len(row.pages))
        for page in row.pages:
            holders[page] += 1
        # What it writes next is its own: the tree knows at most the beginning of that page, from this very row.
        written = row.pages[row.computed // pool.page_tokens :]
        assert all(pool.holders[page] == 1 + (page in tree) for page in written)
    assert holders == pool.holders
    assert sorted(pool.free) == [page for page, count in enumerate(holders) if not count]
    slots = [row.slot for row in scheduler.rows] + scheduler.slots
    assert len(slots) == len(set(slots))
    assert sum(count for _, count in step.prefill) <= scheduler.prefill_tokens


def tree_pages(scheduler: Scheduler) -> set[int]:
    return {node.page for node in scheduler.prefixes.order}


def test_a_hundred_thousand_prompts():
    """To the end, whoever waits: all finish, as long as they should be, the longest expected first, no page is lost."""
    rng, count = random.Random(0), 100_000
    scheduler = make(pages=512, room=64, max_rows=64, prefill_tokens=512)
    heads = [[rng.randrange(50) for _ in range(20)] for _ in range(20)]
    lengths = {}
    for key in range(count):
        prompt = heads[key % 20] + [key % 50, key % 7]
        lengths[key] = 1 + key % 5
        scheduler.add(Request(key, prompt, 0, Sampling(max_new_tokens=50), expected_tokens=1 + key % 97))
    finished, steps = [], 0  # (key, tokens, what was expected)
    for step, done in drive(scheduler, lengths):
        finished += [(row.request.key, row.written, row.request.expected_tokens) for row in done]
        steps += 1
        if steps % 100 == 0:
            check(scheduler, step)
    assert {key for key, _, _ in finished} == set(range(count)) and len(finished) == count == scheduler.stats["samples"]
    assert all(written == lengths[key] for key, written, _ in finished)
    # Whoever finishes later was not expected to be longer, but for the rows that ran at the same time.
    most = 0
    for _, _, expected in reversed(finished):
        most = max(most, expected)
        assert expected >= most - 1
    assert scheduler.stats["shared_tokens"] > 15 * count and not scheduler.stats["preemptions"]
    pool, tree = scheduler.pool, tree_pages(scheduler)
    assert len(pool.free) + len(tree) == pool.num_pages and not scheduler.rows and len(scheduler.slots) == 64


@pytest.mark.parametrize("drafts", [False, True], ids=["", "drafts"])
@pytest.mark.parametrize("seed", range(3))
def test_invariants_hold_in_every_step(drafts, seed):
    """Random prompts with common beginnings, few pages, texts longer than expected: rows are preempted all the time."""
    rng = random.Random(seed)
    scheduler = make(pages=18, drafts=drafts)
    scheduler.lengths.mean_output, scheduler.lengths.learn = 2.0, lambda request, written: None
    heads = [[rng.randrange(50) for _ in range(rng.randrange(1, 90))] for _ in range(4)]
    lengths = {key: rng.randrange(1, 120) for key in range(60)}
    for key in lengths:
        prompt = rng.choice(heads) + [rng.randrange(50) for _ in range(rng.randrange(1, 40))]
        scheduler.add(Request(key, prompt, 0, expected_tokens=rng.choice([0, 5])))
    finished: list[Row] = []
    oldest, waited = None, 0
    for step, done in drive(scheduler, lengths):
        check(scheduler, step)
        finished += done
        # The oldest row is in every step: it is never preempted, so nobody starves.
        first = scheduler.rows[0] if scheduler.rows else None
        waited = waited + 1 if first is oldest else 0
        oldest = first
        assert waited < 300
    assert sorted(row.request.key for row in finished) == list(range(60))
    assert scheduler.stats["preemptions"] > 5 and scheduler.stats["shared_tokens"]
    assert bool(scheduler.stats["accepted_tokens"]) == drafts
    for row in finished:  # preempted or not, with drafts or without: the same text
        assert row.output == [100 + (row.order + i % 9) % 50 for i in range(lengths[row.request.key])]


def test_preempted_rows_come_first_and_keep_their_tokens():
    scheduler, lengths = make(max_rows=2), dict.fromkeys("abc", 30)
    for key, expected in (("a", 5), ("b", 50), ("c", 20)):
        scheduler.add(Request(key, [1, 2, 3], 0, expected_tokens=expected))
    for _ in range(4):
        advance(scheduler, scheduler.schedule(), lengths)
    first, second = scheduler.rows
    assert (first.request.key, second.request.key) == ("b", "c")
    written = second.output
    scheduler.preempt(second)
    step = scheduler.schedule()
    assert scheduler.rows == [first, second] and second.output == written  # before "a", which waits as well
    assert step.prefill == [(second, 7)]  # prompt and output are computed again


def test_a_prompt_waits_for_one_like_it_that_is_being_computed():
    """Samples of a prompt: the first computes it, the others attach in the next step."""
    scheduler, lengths = make(prefill_tokens=200), dict.fromkeys(range(3), 5)
    for key in range(3):
        scheduler.add(Request(key, list(range(40 + WORTH_WAITING)), key))
    step = scheduler.schedule()
    assert [count for _, count in step.prefill] == [40 + WORTH_WAITING] and not step.decode
    advance(scheduler, step, lengths)
    step = scheduler.schedule()
    assert len(step.decode) == 3 and not step.prefill  # one new token each: nothing else was left
    assert scheduler.stats["shared_tokens"] == 2 * (39 + WORTH_WAITING)


def test_chunks_stay_within_the_budget_and_decoding_goes_on():
    scheduler, lengths = make(prefill_tokens=50), {0: 100, 1: 5, 2: 5}
    scheduler.add(Request(0, [7] * 10, 0, expected_tokens=100))
    advance(scheduler, scheduler.schedule(), lengths)
    for key in (1, 2):
        scheduler.add(Request(key, [key] * 120, 0))
    chunks = []
    while len(chunks) < 5:
        step = scheduler.schedule()
        assert step.decode[0][0].request.key == 0  # in every step
        chunks.append([count for _, count in step.prefill])
        advance(scheduler, step, lengths)
    assert chunks == [[50], [50], [20, 30], [50], [40]]


def test_backing_off_makes_steps_smaller_until_nothing_is_left_to_give():
    scheduler = make(prefill_tokens=4 * LEAST_CHUNK, pages=64)
    for key in range(6):
        scheduler.add(Request(key, [key] * 20, 0, expected_tokens=10))
    scheduler.schedule()
    said = [scheduler.back_off() for _ in range(5)]
    chunks, rows = [note for note in said if "chunks" in note], [note for note in said if "rows" in note]
    assert ("512" in chunks[0], "256" in chunks[1], len(chunks)) == (True, True, 2)
    assert [note.split()[3] for note in rows] == ["3", "1"] and said[-1] == ""
    lengths = dict.fromkeys(range(6), 3)
    most = 0
    for step, _ in drive(scheduler, lengths):
        check(scheduler, step)
        most = max(most, len(step.work))
    assert most == 1 and scheduler.stats["samples"] == 6


def test_it_runs_without_torch():
    """The whole of it: not only the import."""
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_scheduler as t; t.test_a_prompt_waits_for_one_like_it_"
        "that_is_being_computed(); assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)
