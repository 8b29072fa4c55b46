"""The one loop of every stage that asks a model: replay the journal, ask, examine, note, apply, ask again or store.

A task is one record in the making. It knows its next draws, examines a reply without changing anything, and changes in
one place only: `apply` takes a journal entry, so replaying the journal gives the state back. `run_tasks` does the rest.
extend.Extension is the example to read; `Redraw` is the base of tasks that one good draw completes.

    tally = run_tasks(job, [Draft(record, 20) for record in records], lambda: open_writer(stage, job), "answers")

1. Entries of earlier processes are applied, and tasks that are over are stored: no model is opened unless something is
   left to ask.
2. Every reply is on disk as a journal entry before it takes effect, and a record as soon as its task is over. Killed
   at any write and started again, the same records come out, and only texts that were being decoded are drawn again.
3. New requests join while replies are read, so the engine's batch stays full and there are no waves.

An engine is anything with `add(request)`, `run()` and `progress()`: the sampler of this process, or a server elsewhere.
A request's `key` is (task.id, draw). No torch here: a finished stage ends without loading it.
"""

import json
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from lengthen import cli
from lengthen.jobs import Job
from lengthen.records import hash_of

SHOWN = 10  # accepted records a process shows as they come (Task.to_show)
EARLY_LOOK = 24  # tries after which it is said when too little will come out
HOPELESS = ("error", "context")  # the same reply would come again
SCORE_BATCH = 8  # draws whose log-probability questions are asked together, between two steps of the sampler

Draw = tuple[int, ...]  # one call of a task, (attempt,) or (attempt, round, stage): its seed is hashed from id and draw
Entry = dict[str, Any]  # one line of the journal, JSON
Pair = tuple[list[int], list[int]]  # (prompt ids, continuation ids)


class Keyed(Protocol):
    @property
    def key(self) -> Hashable: ...


class Reply(Protocol):
    """What an engine gives back for a request; sampling.request.Sample is one."""

    @property
    def request(self) -> Keyed: ...

    @property
    def error(self) -> str:
        """Why there is no text, shown to the user; "" = there is one."""

    @property
    def num_tokens(self) -> int:
        """Tokens drawn; 0 where an engine does not say."""


class Engine(Protocol):
    def add(self, request: Any) -> None: ...

    def run(self) -> Iterator[Any]:
        """Replies in any order, until nothing is waited for; more may be added meanwhile."""

    def progress(self) -> object:
        """Its `str` stands beside the progress bar."""


@runtime_checkable
class Scorer(Protocol):
    """An engine whose log-probabilities can be asked for: a tensor of one value per continuation token, in nats."""

    def logprobs(self, pairs: list[Pair]) -> Sequence[Any]: ...


E = TypeVar("E", bound=Engine)
R = TypeVar("R", bound=Reply)


class Task(ABC, Generic[E, R]):
    """One record in the making. A subclass sets `record`, whose `id` is the task's."""

    record: dict[str, Any]
    then: "Task[E, R] | None" = None  # a later task of the list, which wants nothing drawn until this one is over

    @property
    def id(self) -> str:
        return self.record["id"]

    @property
    @abstractmethod
    def over(self) -> bool:
        """Whether `outcome` is final."""

    @abstractmethod
    def draws(self) -> list[Draw]:
        """What it wants drawn now; those that run already may be among them."""

    @abstractmethod
    def request(self, draw: Draw, engine: E) -> Any:
        """What the engine's `add` takes, with the key (self.id, draw)."""

    @abstractmethod
    def examine(self, draw: Draw, reply: R, engine: E) -> Entry:
        """The journal entry of a reply: `id`, `reason` ("" = the draw passed), `tokens`, and what `apply` needs.

        Changes nothing. {"missing": why} = there was no reply: not noted, and to be asked for in another run.
        """

    @abstractmethod
    def apply(self, entry: Entry) -> None:
        """Go on to the next draw, or be over."""

    @abstractmethod
    def outcome(self) -> tuple[dict[str, Any], str]:
        """(the record, reason) of a task that is over; reason "" = accepted."""

    def to_show(self) -> list[tuple[str, str]]:
        """What people see of an accepted record as it comes: texts side by side, (heading, text) each."""
        return []

    @abstractmethod
    def restore(self, stored: dict[str, Any], attempts: int) -> None:
        """Take up what an earlier run has stored, with its `reason` if rejected, after up to `attempts` attempts.

        `over` then tells whether the larger settings of this run leave more to try.
        """

    def passes(self, entry: Entry) -> bool:
        """Whether a reply ended a try well; not one that is only on the way."""
        return not entry.get("reason")

    def follow(self, task: "Task[E, R]") -> None:
        """The task whose `then` this is is over: ask now, or be over as well."""

    # Hook 1: questions about the log-probabilities of texts, about what a task has just drawn

    def unscored(self) -> list[Draw]:
        """Draws that wait for log-probabilities."""
        return []

    def questions(self, draw: Draw, engine: E) -> list[Pair]:
        """What to measure for a draw; [] = nothing, `examine_scores` is called all the same."""
        return []

    def examine_scores(self, draw: Draw, sums: list[float]) -> Entry:
        """The journal entry of the answers: the summed log-probability of each pair's continuation, in nats."""
        raise NotImplementedError

    # Hook 2: decisions that depend on those of other tasks (near-duplicates), taken in a fixed order: every task's
    # first draw in the order of the list, then the second draws of those that failed, and so on. Draws finish in any
    # order and wait for their turn; only `take_turn` makes such a task `over`.

    in_turn = False

    @property
    def ready(self) -> bool:
        """Whether the draw whose turn is next is known well enough to be decided."""
        return False

    def take_turn(self) -> str:
        """Decide that draw: "" = it passed, else the reason for which it failed, which is counted."""
        raise NotImplementedError


class Redraw(Task[E, R]):
    """A record that one draw completes: drawn again, with another seed each time, until one passes.

    A subclass says what is asked (`request`) and what a reply is worth (`read`). `reason`: of a record that is rejected
    without a draw; None = it is to be drawn.
    """

    def __init__(self, record: dict[str, Any], max_attempts: int, reason: str | None = None):
        self.record, self.max_attempts = record, max_attempts
        self.attempt = 0  # the next one, or the last one when it is over
        self.reason = reason  # why the last attempt failed, "" = accepted; None = not over
        self.never_drawn = reason is not None

    @property
    def over(self) -> bool:
        return self.reason is not None

    def restore(self, stored: dict[str, Any], attempts: int) -> None:
        if self.never_drawn:
            return
        reason, last = stored.get("reason", ""), stored["attempt"]
        used = attempts if last < 0 else last + 1  # below 0: the last resort after all of them
        again = (last < 0 or bool(reason)) and reason not in HOPELESS and used < self.max_attempts
        self.attempt, self.reason = (used, None) if again else (max(last, 0), reason)

    @abstractmethod
    def read(self, reply: R, engine: E) -> tuple[dict[str, Any], str]:
        """(the fields of the record that a reply fills, reason); reason "" = it passes."""

    def last_resort(self, record: dict[str, Any], reason: str) -> tuple[dict[str, Any], str]:
        """(record, reason) once the last attempt has failed; reason "" accepts it after all."""
        return record, reason

    def draws(self) -> list[Draw]:
        return [] if self.over else [(self.attempt,)]

    def examine(self, draw: Draw, reply: R, engine: E) -> Entry:
        fields, reason = self.read(reply, engine)
        # The same error would come again: a prompt that does not fit the context, say.
        last = not reason or bool(reply.error) or draw[0] + 1 >= self.max_attempts
        entry = {"id": self.id, "attempt": draw[0], "reason": reason, "tokens": reply.num_tokens, "last": last}
        return {**entry, "fields": fields if last else {}}  # a text that is drawn again is not kept

    def apply(self, entry: Entry) -> None:
        assert entry["attempt"] == self.attempt and not self.over, (entry, self.attempt)
        if not entry["last"]:
            self.attempt += 1
            return
        record, reason = {**self.record, **entry["fields"], "attempt": self.attempt}, entry["reason"]
        self.record, self.reason = self.last_resort(record, reason) if reason else (record, "")

    def outcome(self) -> tuple[dict[str, Any], str]:
        return self.record, self.reason or ""


# ---------------------------------------------------------------------------------------------------------
# The driver


@dataclass
class Tally:
    """What it took, earlier processes included."""

    attempts: int = 0  # replies examined
    tokens: int = 0
    missing: Counter[str] = field(default_factory=Counter)  # why requests of this run got no reply

    def statistics(self) -> dict[str, int]:
        """For the summary."""
        return {"attempts": self.attempts, "tokens": self.tokens}


def run_tasks(job: Job, tasks: Sequence[Task[E, R]], open_engine: Callable[[], E], what: str) -> Tally:
    """Bring every task to its end and store its record; `what` names them beside the progress bar.

    `open_engine` is called only if something is left to ask. Tasks without a reply (`missing`) are left as they are.
    The finished files have the records in the order of the tasks.
    """
    job.places = {task.id: place for place, task in enumerate(tasks)}
    driver = _Driver(job, tasks)
    driver.replay()
    if driver.left:
        driver.ask_all(open_engine(), what)
    return driver.tally


class _Driver(Generic[E, R]):
    def __init__(self, job: Job, tasks: Sequence[Task[E, R]]):
        self.job, self.tally = job, Tally()
        self.tasks = {task.id: task for task in tasks}
        assert len(self.tasks) == len(tasks), "two tasks have the same id"
        self.left = dict(self.tasks)  # those not stored yet
        self.others = 0  # accepted records of no task: those of another judge, say
        # A record's fields before anything is drawn: by them an input that says something else is noticed.
        self.made_of = {
            id_: hash_of(json.dumps(task.record, sort_keys=True, default=str)) for id_, task in self.tasks.items()
        }
        self.turns: deque[Task[E, R]] = deque()
        self.asked: dict[Hashable, tuple[Task[E, R], Draw]] = {}  # (id, draw) -> what runs
        self.unscored: dict[tuple[str, Draw], Task[E, R]] = {}
        self.engine: E | None = None
        self.read, self.shown = False, 0  # whether a text was shown as it came; accepted records that were
        self.tried = self.passed = 0
        self.halfway: set[tuple[str, int]] = set()  # tries of which a part passed: they are longer than those that fail
        self.warned = not job.use_journal  # a judge's verdicts are no yield

    def replay(self) -> None:
        """The state that earlier processes left."""
        job = self.job
        stored = {r["id"]: r for r in (*job.records, *job.rejected) if r["id"] in self.tasks}
        if "inputs" in job.grown:
            self._compare(stored)
        noted = {entry.get("id") for entry in job.journal}
        attempts = job.grown.get("max_attempts", job.settings.get("max_attempts", 0))
        for id_ in stored.keys() - noted if job.use_journal else ():  # of a run that had finished, before it grew
            self.tasks[id_].restore(stored[id_], attempts)
        for entry in job.journal:
            if task := self.tasks.get(entry.get("id", "")):  # a stage may note other things too
                if "stored" in entry:
                    task.restore(entry["stored"], entry["attempts"])
                else:
                    self._apply(task, entry)
        if job.grown:
            for id_ in [id_ for id_ in self.tasks if id_ in noted]:
                task = self.tasks[id_]
                if task.over and id_ not in stored:  # by the journal alone: killed before its record was stored
                    record, reason = task.outcome()
                    task.restore({**record, "reason": reason}, attempts)
                elif id_ in stored:
                    task.restore(stored[id_], attempts)
            again = [row for id_, row in stored.items() if not self.tasks[id_].over]
            final = [row for id_, row in stored.items() if self.tasks[id_].over and self.tasks[id_].in_turn]
            job.take_back(again, final)
        if job.use_journal and (gone := [r["id"] for r in job.records if r["id"] not in self.tasks]):
            cli.say(
                f"{len(gone)} records go to {job.rejected_path.name}: the input has no longer what they were made of"
            )
            job.drop(dict.fromkeys(gone, "input-gone"))
        self.turns.extend(task for task in self.tasks.values() if task.in_turn and not task.over)
        for task in self.tasks.values():
            # Over from the start, killed between its last entry and its record, or stored before.
            if task.id in self.left and (task.over or (task.id in job.done_ids and not task.in_turn)):
                self._store(task)
        self._take_turns()

    def _compare(self, stored: dict[str, dict[str, Any]]) -> None:
        """An input that has changed: what was made of it must still be what it says."""
        if not stored and self.job.done_ids:
            raise self.job.refuse_input("nothing of what was asked before is asked now")
        for id_, row in stored.items():
            for name, value in self.tasks[id_].record.items():
                if value not in ("", -1, []) and row.get(name, value) != value:
                    raise self.job.refuse_input(f"{name!r} of record {id_} is another")
        for entry in self.job.journal:
            if entry.get("of", "") not in ("", self.made_of.get(entry.get("id", ""), "")):
                raise self.job.refuse_input(f"record {entry['id']} was begun with another text")

    def ask_all(self, engine: E, what: str) -> None:
        self.engine = engine
        self.others = sum(record["id"] not in self.tasks for record in self.job.records)
        for task in self.left.values():  # all at once: the engine orders its queue itself
            self._ask(task)
        with cli.progress(what, len(self.tasks)) as bar:
            # Again, where the scores asked for after the last reply make new draws necessary.
            while self.left and (self.asked or self.unscored):
                for reply in engine.run():
                    self._take(reply, engine)
                    accepted = len(self.job.records) - self.others
                    draws = f"{accepted} accepted, {self.tally.attempts} texts written"
                    bar.update(len(self.tasks) - len(self.left), f"{draws}, {engine.progress()}")
                    if self.asked and not self.left:
                        break  # what still runs was drawn ahead, and is not needed
                assert not (self.asked and self.left), "the engine has left requests without a reply"
                self._score(engine)
                self._take_turns()

    def _ask(self, task: Task[E, R]) -> None:
        """Put in the queue what the task wants now, draws and scores."""
        if self.engine is None or task.over:  # None: replaying, `ask_all` comes later
            return
        self.unscored |= {(task.id, draw): task for draw in task.unscored()}
        for draw in task.draws():
            if (task.id, draw) not in self.asked:
                self.asked[task.id, draw] = task, draw
                self.engine.add(task.request(draw, self.engine))

    def _take(self, reply: R, engine: E) -> None:
        task, draw = self.asked.pop(reply.request.key)
        entry = task.examine(draw, reply, engine)
        if not self.read and (text := getattr(reply, "text", "")):  # whatever comes of it: something to read, early
            failed = f", not used: {entry['reason']}" if entry.get("reason") else ""
            cli.show_texts([(f"the first text, {reply.num_tokens} tokens{failed}", text)])
            self.read = True
        if "missing" in entry:
            self.tally.missing[entry["missing"]] += 1
            return
        if reply.error:
            cli.say(f"  {task.id}: {reply.error}")
        self._note(task, entry)
        if len(self.unscored) >= SCORE_BATCH:
            self._score(engine)
        self._take_turns()
        if self.left and not self.warned and self.tried >= max(EARLY_LOOK, len(self.halfway)):
            self._look_ahead()

    def _look_ahead(self) -> None:
        """Say it now, once, when too little will come out at the rate so far; not hours later, at the end."""
        job, failed = self.job, 1 - self.passed / self.tried
        expected = len(job.records) + len(self.left) * (1 - failed ** job.settings.get("max_attempts", 1))
        if expected >= max(1, job.min_yield):
            return
        self.warned = True
        shares = ", ".join(f"{n / job.counts.total():.0%} {reason}" for reason, n in job.counts.most_common(4))
        cli.say(
            cli.spelt(
                f"warning: {self.passed} of the first {self.tried} tries passed ({shares}); at this rate about "
                f"{expected:.0f} of {len(self.tasks)} records come out. What helps: {job.remedy(job.counts)}"
            )
        )

    def _note(self, task: Task[E, R], entry: Entry) -> None:
        """On disk first, then in force; after that the next draw, or the record."""
        if self.job.use_journal:
            self.job.note({**entry, "of": self.made_of[task.id]})
        self._apply(task, entry)
        if task.over and not task.in_turn:
            self._store(task)
        else:
            self._ask(task)

    def _apply(self, task: Task[E, R], entry: Entry) -> None:
        task.apply(entry)
        if "tokens" in entry:  # an entry of `examine_scores` has none
            self.tally.attempts += 1
            self.tally.tokens += entry["tokens"]
            if not task.in_turn:
                one = task.id, entry["attempt"]
                if entry["reason"] or task.passes(entry):
                    self.tried, self.passed = self.tried + 1, self.passed + (not entry["reason"])
                    self.halfway.discard(one)
                else:
                    self.halfway.add(one)
        if entry.get("reason") and not task.in_turn:
            self.job.count(entry["reason"])

    def _score(self, engine: E) -> None:
        """All questions that wait, in one batch: a pass over eight short texts costs little more than over one."""
        waiting = [(task, draw) for (id_, draw), task in self.unscored.items() if id_ in self.left]
        questions = [task.questions(draw, engine) for task, draw in waiting]
        pairs = [pair for asked in questions for pair in asked]
        sums: Iterator[float] = iter(())
        if pairs:
            assert isinstance(engine, Scorer), "this engine gives no log-probabilities"
            sums = (float(values.sum()) for values in engine.logprobs(pairs))
        entries = [
            task.examine_scores(draw, [next(sums) for _ in asked])
            for (task, draw), asked in zip(waiting, questions, strict=True)
        ]
        for (task, _), entry in zip(waiting, entries, strict=True):
            self._note(task, entry)
        self.unscored.clear()  # only now: noting one score of a task lists its others again

    def _take_turns(self) -> None:
        """Decide every draw whose turn has come; a failed one's next draw has its turn after all others."""
        while self.turns and self.turns[0].ready:
            task = self.turns.popleft()
            reason = task.take_turn()
            self.tried, self.passed = self.tried + 1, self.passed + (not reason)
            if reason:
                self.job.count(reason)
            if task.over:
                self._store(task)
            else:
                self.turns.append(task)
                self._ask(task)

    def _store(self, task: Task[E, R]) -> None:
        while True:
            waited_for = self.left.pop(task.id, None) is not None
            if waited_for and task.id not in self.job.done_ids:  # else: stored before, and decided the same way now
                record, reason = task.outcome()
                self.job.reject(record, reason) if reason else self.job.accept(record)
                if not reason and self.engine and self.shown < SHOWN and (texts := task.to_show()):
                    self.shown += 1
                    cli.show_texts(texts)
            if task.then is None:
                return
            if task.then.id in self.left:  # else: it was stored before this one was taken up again
                task.then.follow(task)
                if not task.then.over:
                    return self._ask(task.then)
            task = task.then
