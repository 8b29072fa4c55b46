"""Rewrite each draft into a longer text, in two stages: the Extender's part of Self-Lengthen, and its heart.

A model writes no more in one call than the length it is used to. So a round of extension is two calls
(arXiv 2410.23933; `Extension` below):

1. Stage 1: the Extender enriches the first half of the text alone. The first two thirds of the paragraphs it returns
   are kept as a prefix: the last third is cut, so that no ending survives.
2. Stage 2: it enriches the WHOLE text, its answer prefilled with that prefix. The prefix shows by how much to expand,
   and the habitual length is left for the second half. Result = prefix + continuation.
3. The result is the next round's text if it passes the filters and is longer; else the round is tried again.
4. After up to --rounds rounds the job is accepted if the text has more than --min-gain times the words of the draft.
5. Length bias: of all accepted texts the shortest fifth always goes, 40.5 % go on average.

Reads responses.jsonl, writes extended.jsonl (and .rejected.jsonl, .meta.json). extended.work.jsonl holds every prefix,
accepted round and failed try while the stage runs: a kill costs only the texts being decoded, and the same command
continues with the same seeds.

Departures from the paper and its release:
 1. A text of one paragraph is divided by sentences, so neither the first half nor the prefix is ever empty.
 2. Prefix and continuation are joined by the paragraph break that followed the prefix; the model sees it too.
 3. Both stages must end by EOS. Two thirds of a cut stage 1 could be used in principle; but what did not end for half
    the text does not end for the whole, and it would leave stage 2 the smallest room.
 4. Chatter around either stage's text is stripped, else the text is rejected; so are loops, and openings that speak of
    the "outline" the template calls the draft.
 5. A try is one pass of two stages, and --max-attempts counts the tries of all rounds of a job together. When a round
    has used them up, what earlier rounds reached still counts. The last round must reach --min-gain.
 6. The repetition penalty counts the output and its prefix only: over the draft, it drives the Extender away from the
    draft's own words (--penalty-scope all is the release's way).
 7. --stages takes any number. Stage i of N enriches the first i of N parts of the text, prefilled with two thirds of
    what each stage before it wrote. 2 is the paper's; 1 is the control, a single call without a prefix.
 8. Jobs run side by side, each at its own stage: another text takes the place of a finished one at once, the next call
    of the same job before a new one. The longest drafts start first, so that none of them
    is waited for at the end.
 9. --one-pair spends the tokens on more instructions: the jobs of an instruction run one after the other, those of its
    longest draft first, until one is accepted; the rest are rejected as "has-pair" without a call. Ids and seeds of
    the calls that are made stay the same.

    python extend.py --model smollm2 --input runs/demo/iter_1/responses.jsonl \\
        --output runs/demo/iter_1/extended.jsonl --samples 2 --max-attempts 6
"""

import argparse
import re
import statistics
from dataclasses import dataclass, field
from functools import cache

from lengthen import cli
from lengthen.cli import InputFlags, ModelFlags, OutputFlags, SamplingFlags, at_least, flag
from lengthen.jobs import Job
from lengthen.models.chat import fill, template_hashes
from lengthen.reading import filter_language, read_answers
from lengthen.records import UserError, new_record, record_id, run_id_of
from lengthen.sampling.request import Request, Sample
from lengthen.stage import Stage, Writer, length_bias_drops, open_job, open_writer
from lengthen.tasks import Draw, Entry, Tally, Task, run_tasks
from lengthen.text import languages
from lengthen.text.filters import clean_answer, finish_reason, has_chatter, is_loop, is_refusal, strip_chatter
from lengthen.text.words import count_words, detect_language, split_paragraphs

KEPT = (2, 3)  # share of the paragraphs that a stage returns: what the next one continues


@dataclass(frozen=True)
class ExtendFlags:
    """The flags of this stage, beside those that every stage has (lengthen/cli.py)."""

    samples: int = flag(2, "independent jobs for each draft", at_least(1))
    rounds: int = flag(3, "extensions, each of the text of the one before", at_least(1))
    max_attempts: int = flag(20, "tries of one job, over all its rounds", at_least(1))
    min_gain: float = flag(1.2, "accept only if longer than this many times the draft", at_least(0, float))
    penalty_scope: str = flag(
        "output", "the repetition penalty counts output and prefix, or also the draft", choices=("output", "all")
    )
    stages: int = flag(
        2,
        "calls per round, each over one more part of the text: 2 = the paper's, 1 = one call, the control",
        at_least(1),
    )
    one_pair: bool = flag(
        False, "no more jobs for an instruction once one was accepted: its jobs run one after the other"
    )
    no_length_bias: bool = flag(False, "keep the short texts too")


# ---------------------------------------------------------------------------------------------------------
# Cutting texts

# The position after a sentence and its closing quote or bracket. Chinese puts no blank there; "3.14" does not count.
# Four cases: 。 alone, 。 with a closing mark, then "." and "." with a closing mark, which need white space after them.
_SENTENCE_END = re.compile(
    r"(?<=[。！？])(?![。！？”’」』）》])|(?<=[。！？][”’」』）》])|(?<=[.!?…])\s+(?!»)|(?<=[.!?…][\"'”’“»)\]])\s+"
)


def first_share(text: str, share: tuple[int, int]) -> tuple[str, str]:
    """Return the first share of a text's paragraphs, verbatim, and the break after it; ("", "") for one sentence."""
    text = text.replace("\r\n", "\n")
    parts = split_paragraphs(text)
    one_paragraph = len(parts) < 2
    if one_paragraph:
        parts = [part for part in _SENTENCE_END.split(text) if part.strip()]
    # Rounded down, but of two parts or more at least the first: neither half of a text nor a prefix is ever empty.
    wanted = max(len(parts) * share[0] // share[1], min(1, len(parts) - 1))
    end = 0  # characters; found again in the text, because the break between two parts is part of what is kept
    for part in parts[:wanted]:
        end = text.index(part, end) + len(part)
    gap = text[end:][: len(text[end:]) - len(text[end:].lstrip())]  # the white space after it
    # Lines stay lines; where sentences were divided, a new paragraph begins.
    return text[:end].strip(), "" if not end else "\n" if not one_paragraph and gap.count("\n") == 1 else "\n\n"


def shown(text: str, stage: int, stages: int) -> str:
    """What a stage enriches: of two stages the first half of the text, then all; all where it cannot be divided."""
    return text if stage == stages else first_share(text, (stage, stages))[0] or text


def speaks_of_task(text: str, given: str, language: str) -> bool:
    """Whether a text opens with words about the "outline" of the template, which neither instruction nor draft uses.

    "Awesome! Please share the outline with me" is how SmolLM2 makes a text longer. Only the opening counts: a long
    story may well have the outline of a hill in it.
    """
    task = _outline(languages.language(language))
    # 300 characters: two or three sentences.
    return bool(task.search(text[:300]) and not task.search(given))


@cache
def _outline(language: languages.Language) -> re.Pattern:
    return re.compile("|".join(one.outline for one in languages.heard(language)), re.IGNORECASE)


def examine_prefix(prefix: str, text: str, finish: str, language: str) -> tuple[str, str]:
    """Return (prefix with its break, reason): what the next stage is prefilled with, or why this output is of no use.

    The first stage must give a prefix. A later one that ends at once adds nothing, and the next continues the same.
    """
    if reason := finish_reason(finish):
        return "", reason
    if not prefix and is_refusal(text, language):
        return "", "refusal"
    # Only a beginning can have an opening ("Here is the text:"); after a prefix, the break is there already.
    text = text.lstrip() if prefix else strip_chatter(text, language)[0]
    kept = prefix + "".join(first_share(text, KEPT))
    if not kept:
        return "", "empty"
    if is_loop(prefix + text, language):
        return "", "repetition"
    if has_chatter(kept, language):  # else it would only be found after the last stage has been paid for
        return "", "chatter"
    return (kept, "") if detect_language(kept) == language else ("", "language")


def examine_round(prefix: str, text: str, finish: str, language: str) -> tuple[str, str]:
    """Return (prefix + continuation without chatter, reason); reason "" = it passes the filters."""
    # Of the continuation, which the prefix would hide; "error" and "repetition" say more about it.
    if not text.strip() and finish_reason(finish) in ("", "unfinished"):
        return "", "empty"
    return clean_answer(prefix + text.lstrip(), finish, language)


# ---------------------------------------------------------------------------------------------------------
# One job


@dataclass
class Extension(Task[Writer, Sample]):
    """A draft on its way to a longer text. `examine` judges a sample, and `apply` alone changes the state.

    What `examine` returns is what the journal holds, so applying a journal's entries in order gives the state back.
    lengthen/tasks.py does the rest: it asks for `draws`, keeps the journal, and stores `outcome` once a job is `over`.
    """

    record: dict  # the extended record it will be: ids, prompt, initial, initial_words
    rules: ExtendFlags
    text: str = ""  # the draft, then the last accepted round
    round_words: list[int] = field(default_factory=list)  # after each accepted round
    attempt: int = 0  # the current try, counted over all rounds
    accepted_attempt: int = -1  # the try that gave `text`
    stage: int = 1  # of this try
    prefix: str = ""  # what is left of the stages before it
    reason: str = ""  # why the last failed try failed
    tries: int = 0  # passes of all stages; one that failed early counts
    passed: int = 0  # of them, those that gave a longer text
    prefix_tokens: int = 0  # drawn in all stages but the last
    waits: bool = False  # for an earlier job of its instruction (--one-pair), ...
    spared: bool = False  # ... and that one, or one before it, was accepted

    def __post_init__(self) -> None:
        self.text = self.text or self.record["initial"]

    @property
    def last_stage(self) -> bool:
        return self.stage == self.rules.stages

    @property
    def over(self) -> bool:
        # Tries are shared by all rounds: a hard first round leaves fewer for the others.
        used_up = len(self.round_words) >= self.rules.rounds or self.attempt >= self.rules.max_attempts
        return used_up or self.spared

    @property
    def words(self) -> int:
        return self.round_words[-1] if self.round_words else self.record["initial_words"]

    def draft(self) -> str:
        """What the next call is asked to enrich."""
        return shown(self.text, self.stage, self.rules.stages)

    def draw(self) -> tuple[int, int, int]:
        """(attempt, round, stage) of the next call: its sampling seed is hashed from them."""
        return self.attempt, len(self.round_words), self.stage

    def draws(self) -> list[Draw]:
        return [] if self.over or self.waits else [self.draw()]

    def follow(self, task: Task[Writer, Sample]) -> None:
        assert isinstance(task, Extension)
        self.waits, self.spared = False, task.spared or not task.outcome()[1]

    def restore(self, stored: dict, attempts: int) -> None:
        self.text, self.round_words = stored["response"], list(stored["round_words"])
        self.accepted_attempt, self.reason = stored["attempt"], stored.get("reason", "")
        self.attempt, self.stage, self.prefix = attempts, 1, ""
        self.record["response_tokens"] = stored["response_tokens"]
        self.spared = self.reason == "has-pair"

    def passes(self, entry: Entry) -> bool:
        return not entry["reason"] and entry["stage"] == self.rules.stages

    def request(self, draw: Draw, writer: Writer) -> Request:
        draft = self.draft()
        content = fill("extend", self.record["language"], instruction=self.record["prompt"], draft=draft)
        # Tokens: at least as long as what it enriches, less what it is prefilled with. The sampler starts the longest
        # first; but before that the next calls of jobs that have begun, whose prompts begin like those before.
        expected = max(1, len(writer.chat.encode_text(draft)) - len(writer.chat.encode_text(self.prefix)))
        # Over the draft, the repetition penalty would drive the Extender away from the draft's own words.
        whole = self.rules.penalty_scope == "all"
        return writer.request(
            *(self.id, draw, content, self.prefix),
            penalize_prompt=whole,
            expected_tokens=expected,
            follows=draw != (0, 0, 1),
        )

    def examine(self, draw: Draw, sample: Sample, writer: Writer) -> Entry:
        """The journal entry of a sample: with reason "", `text` is a round (the last stage) or a prefix."""
        language = self.record["language"]
        if self.last_stage:
            text, reason = examine_round(self.prefix, sample.text, sample.finish, language)
            reason = reason or self._too_short(count_words(text))
        else:
            text, reason = examine_prefix(self.prefix, sample.text, sample.finish, language)
        if not reason and speaks_of_task(text, self.record["prompt"] + self.record["initial"], language):
            reason = "chatter"
        attempt, round_, stage = draw
        entry = {"id": self.id, "attempt": attempt, "round": round_, "stage": stage, "reason": reason}
        entry |= {"text": "" if reason else text, "tokens": sample.num_tokens}
        if self.last_stage and not reason:  # of the whole text: with its prefix, without chatter, with the EOS
            entry["response_tokens"] = len(writer.chat.encode_answer(text))
        return entry

    def _too_short(self, words: int) -> str:
        if words <= self.words:
            return "not-longer"
        # Earlier rounds may gain little: the next one adds to it.
        last_round = len(self.round_words) + 1 == self.rules.rounds
        return "gain" if last_round and words <= self.rules.min_gain * self.record["initial_words"] else ""

    def apply(self, entry: Entry) -> None:
        """Go on to the next call."""
        assert (entry["attempt"], entry["round"], entry["stage"]) == self.draw(), (entry, self.draw())
        # Counted before the state moves on: the entry is about the stage that has just ended.
        self.tries += self.last_stage or bool(entry["reason"])
        self.prefix_tokens += 0 if self.last_stage else entry["tokens"]
        if entry["reason"]:
            self.reason = entry["reason"]
            # A draft that does not fit the context never will; a prefix that does not may come out shorter.
            hopeless = entry["reason"] == "error" and not self.prefix
            self.attempt = self.rules.max_attempts if hopeless else self.attempt + 1
            self.stage, self.prefix = 1, ""
        elif not self.last_stage:
            self.stage, self.prefix = self.stage + 1, entry["text"]
        else:  # a round is accepted: the next one starts from its text
            self.text, self.accepted_attempt = entry["text"], self.attempt
            self.stage, self.prefix = 1, ""
            self.round_words.append(count_words(self.text))
            self.passed += 1
            # From the journal, so that a resumed run needs no tokenizer to know it.
            self.record["response_tokens"] = entry["response_tokens"]
            self.attempt += 1

    def outcome(self) -> tuple[dict, str]:
        """Return (the record, reason) of a job that is over; reason "" = accepted."""
        changes = {
            "response": self.text,
            "response_words": self.words,
            "finish": "eos" if self.round_words else "",  # only texts that ended by EOS become rounds
            "attempt": self.accepted_attempt,
            "rounds": len(self.round_words),
            "round_words": self.round_words,
            "gain": round(self.words / max(1, self.record["initial_words"]), 4),
        }
        if self.spared:
            return {**self.record, **changes}, "has-pair"
        # Also when the tries were used up: a job with one good round of three is worth keeping.
        accepted = bool(self.round_words) and self.words > self.rules.min_gain * self.record["initial_words"]
        return {**self.record, **changes}, "" if accepted else self.reason

    def to_show(self) -> list[tuple[str, str]]:
        gain = self.words / max(1, self.record["initial_words"])
        draft = f"draft, {self.record['initial_words']} words", self.record["initial"]
        return [draft, (f"extension, {self.words} words, {gain:.2f} times as long", self.text)]


# ---------------------------------------------------------------------------------------------------------


def read_drafts(paths: list[str], language: str) -> list[dict]:
    """Drafts of one or several files, longest first: they take the most calls and the longest ones."""
    drafts: list[dict] = []
    origin: dict[str, str] = {}  # id -> its file
    for path in paths:
        for row in read_answers(path):
            if row["id"] in origin:
                raise UserError(f"id {row['id']!r} is in {origin[row['id']]} and again in {path}")
            origin[row["id"]] = path
            drafts.append({**row, "words": count_words(row["response"])})
    # Ties by id: the same order on every machine, whatever the order of the files.
    return sorted(filter_language(drafts, language), key=lambda row: (-row["words"], row["id"]))


def make_extensions(drafts: list[dict], run_id: str, rules: ExtendFlags) -> list[Extension]:
    """--samples jobs a draft, in the order in which they are to start."""
    extensions = []
    for draft in drafts:
        for sample in range(rules.samples):
            id_ = record_id("extended", draft["id"], sample)
            base = {"id": id_, "parent_id": draft["id"], "language": draft["language"], "run_id": run_id}
            initial = {"initial": draft["response"], "initial_words": draft["words"]}
            record = new_record("extended", **base, sample=sample, prompt=draft["prompt"], **initial)
            extensions.append(Extension(record, rules))
    if rules.one_pair:  # one after the other, whatever finishes first: the same records on every machine
        last: dict[tuple[str, str], Extension] = {}
        for job in extensions:
            instruction = job.record["language"], job.record["prompt"]
            if before := last.get(instruction):
                before.then, job.waits = job, True
            last[instruction] = job
    return extensions


def statistics_of(extensions: list[Extension], tally: Tally, job: Job) -> dict:
    """The Extender in numbers, before the length bias drops the short texts."""
    gains = [r["gain"] for r in job.records]  # words at the end per word of the draft
    jobs = len(job.done_ids) - sum(e.spared for e in extensions)
    return {
        "jobs": jobs,
        "acceptance": round(len(gains) / max(1, jobs), 4),
        "gain_median": statistics.median(gains) if gains else -1.0,
        "calls": tally.attempts,
        # A try is one pass of all stages: tries_passed / tries is how often a try gives a longer text.
        "tries": sum(e.tries for e in extensions),
        "tries_passed": sum(e.passed for e in extensions),
        "tokens": tally.tokens,
        "prefix_tokens": sum(e.prefix_tokens for e in extensions),
    }


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, "extend.py")
    cli.add_flags(parser, "input", InputFlags)
    cli.add_flags(parser, "output", OutputFlags)
    cli.add_flags(parser, "extension", ExtendFlags)
    cli.add_flags(parser, "model", ModelFlags)
    cli.add_flags(parser, "sampling", SamplingFlags)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    stage = Stage(cli.take(args, OutputFlags), cli.take(args, ModelFlags), cli.take(args, SamplingFlags))
    rules = cli.take(args, ExtendFlags)
    extensions = make_extensions(read_drafts(args.input, stage.out.language), run_id_of(stage.out.output), rules)
    settings = {**vars(rules), "templates": template_hashes(stage.out.language, "extend")}
    if not rules.one_pair:  # files that were begun before there was this flag continue
        del settings["one_pair"]
    with open_job("extend", stage, args.input, settings) as job:
        stats = {}
        if not job.complete:
            # 1) bring all jobs to their end
            tally = run_tasks(job, extensions, lambda: open_writer(stage, job), "extensions")
            stats = statistics_of(extensions, tally, job)
            # 2) only now, because the rank of a text depends on all others
            if not rules.no_length_bias:
                job.drop(length_bias_drops(job.records, stage.out.seed, stage.out.min_yield))
        summary = job.finish(**stats)
    cli.emit(summary)


if __name__ == "__main__":
    cli.run(main)
