"""The driver of all sampling stages: order, turns, scores, retries, and a process killed at every write and rename.

python -m pytest tests/test_tasks.py
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from scripted import Killed, die_at

from lengthen.jobs import LAYOUT, Job, read_sidecar, sidecar_path
from lengthen.reading import read_jsonl
from lengthen.records import UserError, draw_seed
from lengthen.tasks import SCORE_BATCH, SHOWN, Draw, Entry, Pair, Redraw, Task, run_tasks

# ---------------------------------------------------------------------------------------------------------
# An engine without a model, and two kinds of tasks


@dataclass(frozen=True)
class Ask:
    key: tuple[str, Draw]


@dataclass
class Got:
    request: Ask
    number: int  # by the key alone, as a text is by its seed
    error: str = ""
    missing: str = ""
    num_tokens: int = 3


def number_of(id_: str, draw: Draw) -> int:
    return draw_seed(0, id_, *draw) % 1000


class ScriptedEngine:
    """Replies in an order of its own; `reply` may change them. Keeps what was asked."""

    def __init__(self, order: int = 0, reply: Callable[[Got], Got | None] = lambda got: got):
        self.rng, self.reply = random.Random(order), reply
        self.waiting: list[Ask] = []
        self.asked: list[tuple[str, Draw]] = []
        self.scored: list[tuple[int, ...]] = []  # prompt ids
        self.batches: list[int] = []  # pairs in each call of logprobs

    def add(self, request: Ask) -> None:
        self.waiting.append(request)
        self.asked.append(request.key)

    def run(self) -> Iterator[Got]:
        while self.waiting:
            request = self.waiting.pop(self.rng.randrange(len(self.waiting)))
            yield self.reply(Got(request, number_of(*request.key)))

    def progress(self) -> str:
        return ""

    def logprobs(self, pairs: list[Pair]) -> list[torch.Tensor]:
        self.scored += [tuple(prompt) for prompt, _ in pairs]
        self.batches.append(len(pairs))
        return [torch.tensor([float(prompt[0] % 7 - 1), 0.5]) for prompt, _ in pairs]


class Toss(Redraw[ScriptedEngine, Got]):
    """Passes with a number that 3 divides; one that 50 divides at least as a last resort."""

    def request(self, draw: Draw, engine: ScriptedEngine) -> Ask:
        return Ask((self.id, draw))

    def examine(self, draw: Draw, reply: Got, engine: ScriptedEngine) -> Entry:
        return {"missing": reply.missing} if reply.missing else super().examine(draw, reply, engine)

    def read(self, reply: Got, engine: ScriptedEngine) -> tuple[dict, str]:
        reason = "error" if reply.error else "" if reply.number % 3 == 0 else "even" if reply.number % 2 == 0 else "odd"
        return {"number": reply.number}, reason

    def last_resort(self, record: dict, reason: str) -> tuple[dict, str]:
        return (record | {"attempt": -1}, "") if record["number"] % 50 == 0 else (record, reason)


class Unique(Task[ScriptedEngine, Got]):
    """A number modulo 40 that no task before has: judged by a score, decided in turn, drawn two ahead."""

    in_turn = True

    def __init__(self, record: dict, taken: set[int], attempts: int = 6):
        self.record, self.taken, self.attempts = record, taken, attempts
        self.drawn: dict[int, int] = {}
        self.scores: dict[int, float] = {}
        self.attempt = 0
        self.reason: str | None = None

    @property
    def over(self) -> bool:
        return self.reason is not None

    def draws(self) -> list[Draw]:
        last = min(self.attempt + 2, self.attempts)
        return [] if self.over else [(i,) for i in range(self.attempt, last) if i not in self.drawn]

    def request(self, draw: Draw, engine: ScriptedEngine) -> Ask:
        return Ask((self.id, draw))

    def examine(self, draw: Draw, reply: Got, engine: ScriptedEngine) -> Entry:
        return {"id": self.id, "attempt": draw[0], "number": reply.number % 40, "tokens": reply.num_tokens}

    def apply(self, entry: Entry) -> None:
        if "score" in entry:
            assert entry["attempt"] not in self.scores, "scored twice"
            self.scores[entry["attempt"]] = entry["score"]
        else:
            assert entry["attempt"] not in self.drawn, "drawn twice"
            self.drawn[entry["attempt"]] = entry["number"]

    def unscored(self) -> list[Draw]:
        return [(i,) for i, number in self.drawn.items() if number and i not in self.scores]

    def questions(self, draw: Draw, engine: ScriptedEngine) -> list[Pair]:
        number = self.drawn[draw[0]]
        return [] if number == 13 else [([number], [1]), ([7], [2])]  # 13: a question that cannot be asked

    def examine_scores(self, draw: Draw, sums: list[float]) -> Entry:
        return {"id": self.id, "attempt": draw[0], "score": sums[0] - sums[1] if sums else -9.0}

    @property
    def ready(self) -> bool:
        return self.drawn.get(self.attempt) == 0 or self.attempt in self.scores

    def take_turn(self) -> str:
        number = self.drawn[self.attempt]
        reason = judge_number(number, self.taken)
        if reason and self.attempt + 1 < self.attempts:
            self.attempt += 1
        else:
            self.reason, self.record = reason, self.record | {"attempt": self.attempt, "number": number}
        return reason

    def restore(self, stored: dict, attempts: int) -> None:
        reason = stored.get("reason", "")
        if reason and stored["attempt"] + 1 < self.attempts:
            self.attempt = stored["attempt"] + 1
        else:
            self.reason = reason
        if not reason:
            self.taken.add(stored["number"])

    def outcome(self) -> tuple[dict, str]:
        return self.record, self.reason or ""


def judge_number(number: int, taken: set[int]) -> str:
    if number == 0 or number == 13 or number % 7 == 0:  # the score of 7k is -1 against -1: not above 0
        return "zero" if number == 0 else "low"
    if number in taken:
        return "taken"
    taken.add(number)
    return ""


# ---------------------------------------------------------------------------------------------------------
# Running them


def open_file(folder: Path, journal: bool = True) -> Job:
    return Job("tasks", folder / "iter_1" / "x.jsonl", settings={"a": 1}, journal=journal, min_yield=0)


def records_for(num: int) -> list[dict]:
    return [{"id": f"t{i:03}", "attempt": -1, "number": -1} for i in range(num)]


def tosses(num: int = 6) -> list[Toss]:
    return [Toss(record, 4, "early" if i == 2 else None) for i, record in enumerate(records_for(num))]


def uniques(num: int = 6) -> list[Unique]:
    taken: set[int] = set()
    return [Unique(record, taken) for record in records_for(num)]


def run_all(folder: Path, tasks: list, engine: ScriptedEngine, journal: bool = True) -> dict:
    with open_file(folder, journal) as job:
        stats = {}
        if not job.complete:
            stats = run_tasks(job, tasks, lambda: engine, "things").statistics()
        return {**job.finish(**stats), "output": "", "seconds": 0}


def stored(folder: Path) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for name in ("x.jsonl", "x.rejected.jsonl"):
        path = folder / "iter_1" / name
        for row in read_jsonl(path, needs=()) if path.exists() and path.stat().st_size else []:
            assert row["id"] not in found
            found[row["id"]] = row
    return found


def never_opened() -> ScriptedEngine:
    raise AssertionError("the engine was opened")


KINDS = {"tosses": tosses, "uniques": uniques}


def test_every_task_is_drawn_until_it_passes_or_has_no_attempt_left(tmp_path):
    engine = ScriptedEngine()
    summary, found = run_all(tmp_path, tosses(60), engine), stored(tmp_path)
    draws = Counter(id_ for id_, _ in engine.asked)
    assert len(found) == 60 and max(Counter(engine.asked).values()) == 1
    reasons: Counter[str] = Counter()
    for id_, record in found.items():
        if id_ == "t002":
            assert record == {"id": id_, "attempt": -1, "number": -1, "reason": "early"} and not draws[id_]
            continue
        numbers = [number_of(id_, (i,)) for i in range(draws[id_])]
        failed = [n for n in numbers if n % 3]
        reasons.update("odd" if n % 2 else "even" for n in failed)
        assert record["number"] == numbers[-1] and failed in (numbers, numbers[:-1])
        if record.get("reason"):
            assert len(failed) == 4 and record["attempt"] == 3
        else:
            assert record["attempt"] == (-1 if failed == numbers else len(numbers) - 1)
    assert summary["failed_attempts"] == dict(reasons.most_common()) and summary["accepted"] > 40
    assert summary["attempts"] == len(engine.asked) and summary["tokens"] == 3 * len(engine.asked)


def test_the_engine_is_opened_only_for_something_to_ask(tmp_path):
    with open_file(tmp_path) as job:
        early = [Toss(record, 4, "early") for record in records_for(5)]
        run_tasks(job, early, never_opened, "things")
        assert len(job.rejected) == 5
    with open_file(tmp_path) as job:
        run_tasks(job, tosses(5), never_opened, "things")  # all of them are done


@pytest.mark.parametrize("kind", KINDS)
def test_records_do_not_depend_on_the_order_of_replies(tmp_path, kind):
    results = []
    for order in range(4):
        folder = tmp_path / str(order)
        summary = run_all(folder, KINDS[kind](100), ScriptedEngine(order))
        results.append(([*stored(folder).items()], summary["failed_attempts"], summary["accepted"]))
    assert results[0] == results[1] == results[2] == results[3]


def test_turns_are_taken_in_the_order_of_attempt_and_place_whatever_the_order_of_replies(tmp_path):
    """Against the plain loop that decides one draw after the other: 100 tasks that want one of 40 numbers."""
    taken: set[int] = set()
    expected, failed = {}, Counter()
    waiting = records_for(100)
    for attempt in range(6):
        again = []
        for record in waiting:
            number = number_of(record["id"], (attempt,)) % 40
            reason = judge_number(number, taken)
            failed[reason] += 1
            if reason and attempt + 1 < 6:
                again.append(record)
            else:
                end = {"reason": reason} if reason else {}
                expected[record["id"]] = {**record, "attempt": attempt, "number": number, **end}
        waiting = again
    del failed[""]
    assert 20 < len(taken) < 40 and {"zero", "low", "taken"} == set(failed)
    for order in range(3):
        folder, engine = tmp_path / str(order), ScriptedEngine(order)
        summary = run_all(folder, uniques(100), engine)
        assert stored(folder) == expected and summary["failed_attempts"] == dict(failed.most_common())
        assert max(Counter(engine.asked).values()) == 1
        assert all(size <= 2 * (SCORE_BATCH + 1) for size in engine.batches) and engine.batches[0] >= SCORE_BATCH


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_write_and_rename_and_run_again_it_is_the_uninterrupted_run(monkeypatch, tmp_path, kind):
    """Promise 1; each cut tears the line that is being written. What the journal holds is never asked again: neither
    a draw nor a score."""

    def run(name: str, die: int, order: int = 0) -> tuple[ScriptedEngine, dict | None, int]:
        engine = ScriptedEngine(order)
        with monkeypatch.context() as patch:
            steps = die_at(patch, die)
            try:
                return engine, run_all(tmp_path / name, KINDS[kind](), engine), steps()
            except Killed:
                return engine, None, steps()

    never = 10**9
    _, summary, total = run("whole", never)
    whole = stored(tmp_path / "whole")
    assert summary and len(whole) == 6 and total >= 20
    ahead = 0
    for step in range(1, total + 1):
        assert run(str(step), step)[1] is None
        journal = tmp_path / str(step) / "iter_1" / "x.work.jsonl"
        lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
        noted = {(e["id"], (e["attempt"],)) for e in map(json.loads, lines) if "tokens" in e}
        engine, again, _ = run(str(step), never, order=step)
        assert [*stored(tmp_path / str(step)).items()] == [*whole.items()], step
        assert not noted & set(engine.asked), step
        assert again and {**again, "attempts": 0, "tokens": 0} == {**summary, "attempts": 0, "tokens": 0}, step
        assert again["attempts"] == len(noted) + len(engine.asked) - len(engine.waiting), step
        ahead = max(ahead, len(engine.waiting))
        assert not journal.exists()
        assert read_sidecar(tmp_path / str(step) / "iter_1" / "x.jsonl")["status"] == "done"
    assert (ahead > 0) == (kind == "uniques")  # drawn ahead and not waited for


def test_an_interruption_counts_each_failed_attempt_once(tmp_path):
    """The sidecar of an interrupted run holds counts, and so does the journal."""

    def interrupt(got: Got) -> Got:
        if len(engine.waiting) < 30:
            raise KeyboardInterrupt
        return got

    expected = run_all(tmp_path / "whole", tosses(60), ScriptedEngine())
    engine = ScriptedEngine(reply=interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path / "cut", tosses(60), engine)
    assert read_sidecar(tmp_path / "cut" / "iter_1" / "x.jsonl")["attempt_reasons"]
    assert run_all(tmp_path / "cut", tosses(60), ScriptedEngine(1)) == expected
    assert stored(tmp_path / "cut") == stored(tmp_path / "whole")


def test_a_missing_reply_is_left_for_another_run(tmp_path):
    def sometimes(got: Got) -> Got:
        got.missing = "timed out" if number_of(*got.request.key) % 4 == 1 else ""
        return got

    whole = run_all(tmp_path / "whole", tosses(30), ScriptedEngine())
    engine = ScriptedEngine(reply=sometimes)
    with open_file(tmp_path / "some") as job:
        tally = run_tasks(job, tosses(30), lambda: engine, "things")
        assert tally.missing["timed out"] == 30 - len(job.done_ids) > 0
        assert max(Counter(engine.asked).values()) == 1 and tally.attempts == len(engine.asked) - tally.missing.total()
    assert run_all(tmp_path / "some", tosses(30), ScriptedEngine()) == whole
    assert stored(tmp_path / "some") == stored(tmp_path / "whole")


def test_an_error_ends_a_task_at_once_and_is_said(tmp_path, capsys):
    def never_fits(got: Got) -> Got:
        got.error = "the prompt does not fit" if got.request.key[0] == "t001" else ""
        return got

    engine = ScriptedEngine(reply=never_fits)
    run_all(tmp_path, tosses(), engine)
    assert stored(tmp_path)["t001"]["reason"] == "error"
    assert [draw for id_, draw in engine.asked if id_ == "t001"] == [(0,)]
    assert "t001: the prompt does not fit" in capsys.readouterr().err


def test_without_a_journal_finished_tasks_are_skipped_and_the_others_start_again(tmp_path):
    with open_file(tmp_path, journal=False) as job:
        tasks = tosses()
        run_tasks(job, tasks[:3], ScriptedEngine, "things")
        assert not job.work_path.exists() and len(job.done_ids) == 3
    engine = ScriptedEngine()
    run_all(tmp_path, tosses(), engine, journal=False)
    assert {id_ for id_, _ in engine.asked} == {"t003", "t004", "t005"} and len(stored(tmp_path)) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_journal_costs_time_and_no_record(tmp_path, kind):
    """Power that fails may leave the records and not the journal."""

    def stop(got: Got) -> Got:
        if len(job.done_ids) > 10:
            raise KeyboardInterrupt
        return got

    run_all(tmp_path / "whole", KINDS[kind](40), ScriptedEngine())
    with pytest.raises(KeyboardInterrupt), open_file(tmp_path / "cut") as job:
        run_tasks(job, KINDS[kind](40), lambda: ScriptedEngine(reply=stop), "things")
    job.work_path.unlink()
    run_all(tmp_path / "cut", KINDS[kind](40), ScriptedEngine(1))
    assert stored(tmp_path / "cut") == stored(tmp_path / "whole")


def test_other_entries_of_a_journal_are_left_alone(tmp_path):
    with open_file(tmp_path) as job:
        for entry in ({"probed": "t000", "loss": 1.0}, {"id": "of another command", "attempt": 0}):
            job.note(entry)
    assert run_all(tmp_path, tosses(), ScriptedEngine())["accepted"] > 0


def test_a_run_begun_in_another_layout_is_refused_in_one_line(tmp_path):
    """Its journal could not be applied; once it is finished there is no journal, and nothing to refuse."""
    with open_file(tmp_path) as job:
        job.note({"id": "t000", "attempt": 0, "reason": "", "tokens": 3})
    sidecar = sidecar_path(job.output)
    meta = json.loads(sidecar.read_text())
    assert meta["layout"] == LAYOUT
    for layout in (1, None):
        sidecar.write_text(json.dumps({**meta, "layout": layout}))
        with pytest.raises(UserError, match="begun by another version of this program") as caught:
            run_all(tmp_path, tosses(), ScriptedEngine())
        assert "\n" not in caught.value.message and "--overwrite" in caught.value.hint
    sidecar.write_text(json.dumps({k: v for k, v in meta.items() if k != "layout"} | {"status": "done"}))
    run_all(tmp_path, tosses(), ScriptedEngine())


def test_ctrl_c_in_the_last_step_is_not_swallowed(tmp_path):
    """A sampler hands out what has finished, and only then raises."""

    class Interrupted(ScriptedEngine):
        def run(self) -> Iterator[Got]:
            yield from super().run()
            raise KeyboardInterrupt

    with open_file(tmp_path) as job, pytest.raises(KeyboardInterrupt):
        run_tasks(job, tosses(), Interrupted, "things")
    assert len(stored(tmp_path)) == 6


def test_an_engine_that_loses_a_request_is_a_mistake_and_not_an_endless_loop(tmp_path):
    class Forgetful(ScriptedEngine):
        def add(self, request: Ask) -> None:
            if request.key[0] != "t001":
                super().add(request)

    with open_file(tmp_path) as job, pytest.raises(AssertionError, match="without a reply"):
        run_tasks(job, tosses(), Forgetful, "things")


def test_two_tasks_of_one_id_are_a_mistake(tmp_path):
    with open_file(tmp_path) as job, pytest.raises(AssertionError, match="same id"):
        run_tasks(job, [*tosses(2), *tosses(1)], ScriptedEngine, "things")


# ---------------------------------------------------------------------------------------------------------
# Something to see


@dataclass
class Written(Got):
    @property
    def text(self) -> str:
        return f"text {self.number}"


class Seen(Toss):
    def to_show(self) -> list[tuple[str, str]]:
        return [("before", self.id), ("after", f"number {self.record['number']}")]


def test_the_first_text_and_the_first_accepted_records_are_shown_as_they_come(tmp_path, capsys):
    """Whatever comes of the first text; and what an earlier process has shown is not shown again."""
    ids = [f"t{i}" for i in range(60)]
    for half in (ids[:30], ids):
        engine = ScriptedEngine(reply=lambda got: Written(got.request, got.number))
        with Job("toss", str(tmp_path / "x.jsonl"), settings={}, journal=True) as job:
            before = len(job.records)
            run_tasks(job, [Seen({"id": id_}, 3) for id_ in half], lambda engine=engine: engine, "things")
            accepted = len(job.records) - before
        lines = capsys.readouterr().err.splitlines()
        first = [line for line in lines if line.startswith("  the first text, 3 tokens")]
        assert len(first) == 1 and lines.index(first[0]) == 0
        assert [line for line in lines if line.startswith("  before: t")][:1] and accepted > SHOWN
        assert sum(line.startswith("  after: number ") for line in lines) == SHOWN


# ---------------------------------------------------------------------------------------------------------
# Settings that only add work


def grow(folder: Path, kind: str, num: int, attempts: int, engine: ScriptedEngine | None = None) -> dict:
    """One run with these settings; its summary."""
    taken: set[int] = set()
    tasks = [
        Toss(r, attempts, "early" if i == 2 else None) if kind == "tosses" else Unique(r, taken, attempts)
        for i, r in enumerate(records_for(num))
    ]
    settings = {"count": num, "max_attempts": attempts}
    with Job("tasks", folder / "iter_1" / "x.jsonl", settings=settings, journal=True, min_yield=0) as job:
        stats = {}
        if not job.complete:
            stats = run_tasks(job, tasks, lambda: engine or ScriptedEngine(), "things").statistics()
        return {**job.finish(**stats), "output": "", "seconds": 0}


def outcomes(folder: Path) -> dict[str, dict]:
    assert not (folder / "iter_1" / "x.work.jsonl").exists()
    return stored(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_more_attempts_give_the_file_that_one_run_with_them_had_written(tmp_path, kind):
    grow(tmp_path / "whole", kind, 40, 6)
    first = grow(tmp_path / "grown", kind, 40, 2)
    engine = ScriptedEngine(3)
    grown = grow(tmp_path / "grown", kind, 40, 6, engine)
    assert outcomes(tmp_path / "grown") == outcomes(tmp_path / "whole") and grown["accepted"] > first["accepted"]
    assert all(draw[0] >= 2 for _, draw in engine.asked)  # what was drawn is not drawn again
    assert grown["attempts"] == first["attempts"] + len(engine.asked)
    meta = read_sidecar(tmp_path / "grown" / "iter_1" / "x.jsonl")
    assert meta["history"] == {"max_attempts": [2, 6]} and meta["settings"]["max_attempts"] == 6
    assert grow(tmp_path / "grown", kind, 40, 6) == grown  # and then it is done


def test_more_records_leave_those_that_are_there_alone(tmp_path):
    for kind in KINDS:
        grow(tmp_path / kind, kind, 20, 3)
        before = outcomes(tmp_path / kind)
        engine = ScriptedEngine()
        grow(tmp_path / kind, kind, 40, 3, engine)
        after = outcomes(tmp_path / kind)
        assert len(after) == 40 and before == {id_: after[id_] for id_ in before}
        assert not {id_ for id_, _ in engine.asked} & before.keys()
    grow(tmp_path / "whole", "tosses", 40, 3)  # of tasks that know nothing of each other all is the same
    assert outcomes(tmp_path / "tosses") == outcomes(tmp_path / "whole")


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_write_while_it_grows_it_comes_to_the_same(tmp_path, monkeypatch, kind):
    grow(tmp_path / "clean", kind, 8, 2)
    grow(tmp_path / "clean", kind, 12, 5)
    clean, step, died = outcomes(tmp_path / "clean"), 0, True
    while died:
        step, folder = step + 1, tmp_path / str(step)
        grow(folder, kind, 8, 2)
        with monkeypatch.context() as patch:
            die_at(patch, step)
            died = False
            try:
                grow(folder, kind, 12, 5)
            except Killed:
                died = True
        grow(folder, kind, 12, 5)
        assert outcomes(folder) == clean, step
    assert step > 30


def test_an_unfinished_output_grows_too(tmp_path, monkeypatch):
    grow(tmp_path / "whole", "tosses", 30, 6)
    with monkeypatch.context() as patch:
        die_at(patch, 40)
        with pytest.raises(Killed):
            grow(tmp_path / "grown", "tosses", 20, 2)
    grow(tmp_path / "grown", "tosses", 30, 6)
    assert outcomes(tmp_path / "grown") == outcomes(tmp_path / "whole")


def test_killed_between_the_last_entry_and_the_record_it_grows_all_the_same(tmp_path, monkeypatch):
    """At every write of the first run, with more attempts afterwards."""
    grow(tmp_path / "whole", "tosses", 8, 5)
    step, died = 0, True
    while died:
        step, died = step + 1, False
        with monkeypatch.context() as patch:
            die_at(patch, step)
            try:
                grow(tmp_path / str(step), "tosses", 8, 2)
            except Killed:
                died = True
        grow(tmp_path / str(step), "tosses", 8, 5)
        assert outcomes(tmp_path / str(step)) == outcomes(tmp_path / "whole"), step
    assert step > 20


def test_a_smaller_setting_is_refused_in_a_line_that_says_so(tmp_path):
    grow(tmp_path, "tosses", 6, 3)
    files = {p.name: p.read_bytes() for p in (tmp_path / "iter_1").iterdir()}
    with pytest.raises(UserError, match="max_attempts = 3, this command says 2, and .* not taken back") as caught:
        grow(tmp_path, "tosses", 6, 2)
    assert caught.value.hint.startswith("--max-attempts 3 or more goes on")
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "iter_1").iterdir()}


def test_too_little_to_come_is_said_after_a_few_dozen_tries_and_once(tmp_path, capsys):
    class Hopeless(Toss):
        def read(self, reply: Got, engine: ScriptedEngine) -> tuple[dict, str]:
            return {"number": 1}, "unfinished" if reply.number % 4 else "gain"

    def run(folder: str, kind: type, num: int) -> str:
        settings = {"max_attempts": 20}
        with Job("tasks", tmp_path / folder / "x.jsonl", settings=settings, journal=True, min_yield=0) as job:
            run_tasks(job, [kind(r, 20) for r in records_for(num)], ScriptedEngine, "things")
        return capsys.readouterr().err

    said = " ".join(run("bad", Hopeless, 10).split())
    assert said.count("warning:") == 1 and "0 of the first 24 tries passed" in said
    assert re.search(r"\(\d+% unfinished, \d+% gain\); at this rate about 0 of 10 records", said)
    assert "a larger --max-new-tokens" in said and "--max-attempts 40" in said
    assert "warning:" not in run("good", Toss, 60)


class Halves(Toss):
    """A try of two draws, the second where the first passed, as two times in three."""

    part = 0

    def draws(self) -> list[Draw]:
        return [] if self.over else [(self.attempt, self.part)]

    def read(self, reply: Got, engine: ScriptedEngine) -> tuple[dict, str]:
        return {"number": reply.number}, "odd" if not self.part and reply.number % 3 == 0 else ""

    def examine(self, draw: Draw, reply: Got, engine: ScriptedEngine) -> Entry:
        entry = {**super().examine(draw, reply, engine), "part": draw[1]}
        return {**entry, "last": False} if not self.passes(entry) and not entry["reason"] else entry

    def passes(self, entry: Entry) -> bool:
        return not entry["reason"] and entry["part"] == 1

    def apply(self, entry: Entry) -> None:
        self.part = 0 if self.passes(entry) or entry["reason"] else 1
        if not self.part:
            super().apply(entry)


class InOrder(ScriptedEngine):
    def run(self) -> Iterator[Got]:
        while self.waiting:
            request = self.waiting.pop(0)
            yield Got(request, number_of(*request.key))


def test_tries_that_are_half_done_are_waited_for_before_too_little_is_said(tmp_path, capsys):
    """Of the study's first 24 extensions none had passed: what fails ends first, and 56 had come past stage 1."""
    with Job("tasks", tmp_path / "x.jsonl", settings={"max_attempts": 4}, journal=True) as job:
        run_tasks(job, [Halves(record, 4) for record in records_for(100)], InOrder, "things")
    assert job.counts["odd"] > 24 and len(job.records) > 90
    assert "warning:" not in capsys.readouterr().err
