"""The Generator's part of Self-Lengthen: invent instructions, draft answers, write length demands into instructions.

Three commands, each one step of the method (arXiv 2410.23933):

instructions  1. The BASE model sees two seed instructions and writes a third, as a continuation of its own turn.
              2. It judges whether that instruction suits a long article; 3 < words < 500, right language, not a
                 near-duplicate of a seed, of --dedup-against, or of an instruction before it.
responses     3. The Generator answers each instruction --samples times; what fails the filters is drawn again.
              4. Length bias: the shortest fifth of the answers always goes, 40.5 % go on average.
constrain     5. The BASE model writes a length demand that is true of the answer into its instruction; the result is
                 checked, and drawn again if need be. When all attempts are used up, the demand is appended as a
                 sentence of its own. Several input files: this also collects them.

Reads and writes JSONL: seeds -> instructions.jsonl -> responses.jsonl; responses.jsonl + extended.jsonl ->
constrained.jsonl. Beside X.jsonl: X.rejected.jsonl with a `reason`, X.meta.json, and X.work.jsonl while it runs.

Every record is a task (lengthen/tasks.py): NewInstruction, Draft and Demand below say what is asked and which reply is
good enough; run_tasks asks, retries, stores, and continues after a kill.

Departures from the paper and its release:
 1. One tree for all languages: templates, filters and word measures follow each record's language.
 2. The judge is the log-probability of yes minus that of no, not a sampled word compared with "Yes".
 3. Near-duplicate instructions are removed, in the order (attempt, sample): what is kept does not depend on the batch.
 4. An instruction ends at the next number ("Instruction 4") or a blank line; nothing else has stop strings, and
    answers must end by EOS.
 5. Length bias ranks by words, within each language, and ties share a rank.
 6. A demand is true of its answer; the rewritten instruction is checked to state it.
 7. Every draw has its own seed, hashed from --seed, the record's id and the attempt.

    python generate.py responses --model smollm2 --input runs/demo/iter_1/instructions.jsonl \\
        --output runs/demo/iter_1/responses.jsonl
"""

import argparse
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from lengthen import cli
from lengthen.cli import REQUIRED, InputFlags, ModelFlags, OutputFlags, SamplingFlags, at_least, flag
from lengthen.models.chat import fill, template, template_hashes
from lengthen.reading import filter_language, read_answers, read_prompts
from lengthen.records import UserError, draw_seed, new_record, record_id, run_id_of
from lengthen.sampling.request import Request, Sample
from lengthen.stage import Stage, Writer, length_bias_drops, open_job, open_writer, smaller_values
from lengthen.tasks import HOPELESS, Draw, Entry, Pair, Redraw, Task, run_tasks
from lengthen.text import languages
from lengthen.text.demands import make_demand, states_demand
from lengthen.text.filters import clean_answer, finish_reason, strip_chatter
from lengthen.text.selection import NearDuplicates
from lengthen.text.words import count_words, detect_language

MIN_INSTRUCTION_WORDS, MAX_INSTRUCTION_WORDS = 3, 500  # both exclusive, as in the release
INSTRUCTION_TOKENS = 1024  # enough for 500 words; without a limit, one that does not end would fill the context
RETRIES = 2  # draws at a time once the first has failed: one at a time, the last few instructions take the longest
DOES_NOT_FIT = -1e9  # nats: margin of an instruction that leaves no room for the judge's question; always a no

# ---------------------------------------------------------------------------------------------------------
# The flags of each command, beside those that every stage has (lengthen/cli.py)


def steps(text: str) -> tuple[int, int]:
    """'1000,2000' -> (1000, 2000)."""
    match = re.fullmatch(r"([1-9]\d*),([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be two numbers like 1000,2000, got {text!r}")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class InstructionsFlags:
    seeds: list[str] = flag(REQUIRED, "JSONL files with `prompt`: the examples shown")
    count: int = flag(500, "instructions wanted, all languages together", at_least(1))
    dedup_against: list[str] = flag([], "JSONL files whose `prompt` must not come again")
    max_attempts: int = flag(10, "draws for one instruction", at_least(1))
    long_words: int = flag(2000, "what the judge calls a long article, words", at_least(1))
    judge_margin: float = flag(0.0, "minimum log p(yes) - log p(no), nats; =-inf turns the judge off")


@dataclass(frozen=True)
class ResponsesFlags:
    samples: int = flag(2, "answers to each instruction", at_least(1))
    max_attempts: int = flag(20, "draws for one answer", at_least(1))
    no_length_bias: bool = flag(False, "keep the short answers too")


@dataclass(frozen=True)
class ConstrainFlags:
    demand_min: int = flag(2000, "skip answers of fewer words", at_least(1))
    demand_max: int = flag(8000, "skip answers of this many words or more", at_least(1))
    demand_steps: tuple[int, int] = flag(
        (1000, 2000), "words that demands are rounded to: four fifths, one fifth of them", steps, metavar="N,N"
    )
    max_attempts: int = flag(5, "draws before the demand is appended in a sentence of its own", at_least(1))

    def __post_init__(self) -> None:
        if self.demand_min >= self.demand_max:
            raise UserError(f"--demand-min {self.demand_min} is not below --demand-max {self.demand_max}")


# ---------------------------------------------------------------------------------------------------------
# 1, 2: instructions

# What models put before and after an instruction when they continue the list: its number, a label, an answer.
_QUOTES = {'"': '"', "“": "”", "'": "'", "「": "」", "『": "』", "**": "**", "*": "*"}


@cache
def _labels(language: languages.Language) -> tuple[re.Pattern, re.Pattern]:
    """(what stands before an instruction, where an answer to it begins)"""
    spoken = languages.heard(language)
    labels = languages.either(word for one in spoken for word in one.chatter.labels)
    answers = languages.either(word for one in spoken for word in one.chatter.answers)
    label = re.compile(rf"^\W*(?:{labels})\s*\d*\s*[:：.]\W*|^\d+[.:、)]\s*", re.IGNORECASE)
    return label, re.compile(rf"\n\W*(?:{answers})\W*[:：]", re.IGNORECASE)


def clean_instruction(text: str, language: str) -> str:
    """The instruction alone: no number or label before it, no quotes or emphasis around it, no answer after it."""
    # The newline in front: an answer may begin in the first line, and then nothing is left.
    label, answer = _labels(languages.language(language))
    text = label.sub("", answer.split("\n" + text)[0].strip()).strip()
    for left, right in _QUOTES.items():
        inside = text[len(left) : -len(right)]  # no quote in it: '"Ships" and "harbours"' is not one quotation
        if text.startswith(left) and text.endswith(right) and inside and left not in inside:
            return inside.strip()
    return text


def examine_instruction(text: str, finish: str, language: str) -> tuple[str, str]:
    """Return (instruction, reason); reason "" = to be judged."""
    instruction = clean_instruction(text, language)
    # "stop": it went on to the next number, or to something after a blank line (`item_ends`).
    if reason := finish_reason(finish, ends=("eos", "stop")):
        return instruction, reason
    if not MIN_INSTRUCTION_WORDS < count_words(instruction) < MAX_INSTRUCTION_WORDS:
        return instruction, "words"
    return instruction, "" if detect_language(instruction) == language else "language"


def item_ends(shots: list[dict], language: str) -> tuple[str, ...]:
    """Stop strings: the next number; and a blank line, where the shots have none inside.

    After it, small models continue with remarks about the list ("Note: these instructions …"): 12 of 15 of SmolLM2's.
    """
    has_blank_line = any("\n\n" in shot["prompt"].strip() for shot in shots)
    # The template ends with "Instruction 3:", so the model writes the third, and may go on to the fourth.
    third = template("instruct_prefill", language).splitlines()[-1].rstrip(":： \u00a0\u202f")
    following = f"\n{third.replace('3', '4')}"
    return (following,) if has_blank_line else (following, "\n\n")


def split_count(count: int, seeds: list[dict], before: Sequence[int] = ()) -> list[str]:
    """One language per wanted instruction, in proportion to the seeds' languages, one after the other.

    before: the smaller counts that this output was asked for earlier; what was of a language then stays of it.
    """
    if before:
        earlier = split_count(before[-1], seeds, before[:-1])
        now = Counter(split_count(count, seeds)) - Counter(earlier)
        return (earlier + [code for code in sorted(now) for _ in range(now[code])])[:count]
    # Each gets what is rounded up to its end, the last one the rest: together they are always `count`.
    split: list[str] = []
    for code in sorted({s["language"] for s in seeds}):
        end = round(count * sum(s["language"] <= code for s in seeds) / len(seeds))
        split += [code] * (end - len(split))
    return split


def draw_shots(record_id_: str, language: str, seeds: list[dict]) -> list[dict]:
    """The two examples of a record: the same on every machine and in every attempt."""
    # Sorted by id, and drawn by the record's: neither the order of the files nor --seed changes what is shown.
    same = sorted((s for s in seeds if s["language"] == language), key=lambda s: s["id"])
    if len(same) < 2:
        raise UserError(f"two seeds of language {language!r} are needed, found {len(same)}", "--seeds FILE [FILE ...]")
    return random.Random(record_id_).sample(same, 2)


class NewInstruction(Task[Writer, Sample]):
    """An instruction that the model invents. Its draws finish in any order, but near-duplicates are decided in turn."""

    in_turn = True

    def __init__(self, record: dict, shots: list[dict], rules: InstructionsFlags, distinct: NearDuplicates):
        self.record, self.shots, self.rules = record, shots, rules
        self.distinct = distinct  # shared by all tasks: the seeds, and the instructions accepted so far
        self.drawn: dict[int, tuple[str, str]] = {}  # attempt -> (instruction, reason; "" = to be judged)
        self.margins: dict[int, float] = {}  # attempt -> log p(yes) - log p(no), nats
        self.attempt = 0  # the one whose turn is next
        self.reason: str | None = None  # why the last attempt failed, "" = accepted; None = not over

    @property
    def over(self) -> bool:
        return self.reason is not None

    def verdict(self, attempt: int) -> str | None:
        """Why an attempt failed, "" = it did not (unless it is a near-duplicate), None = not known yet."""
        # The filters first: the judge is not asked about what they refuse.
        _, reason = self.drawn.get(attempt, ("", None))
        if reason != "" or self.rules.judge_margin == float("-inf"):
            return reason
        if attempt not in self.margins:
            return None
        return "" if self.margins[attempt] > self.rules.judge_margin else "judge"

    def draws(self) -> list[Draw]:
        attempt = self.attempt
        # An attempt that has failed is followed up at once: its turn may be far away.
        while self.verdict(attempt) and attempt + 1 < self.rules.max_attempts:
            attempt += 1
        if self.over or self.verdict(attempt) == "":
            return []  # it only waits for its turn
        # The first draw is made alone, it may pass. After a failure two at a time shorten the end of the stage.
        ahead = min(attempt + (RETRIES if attempt else 1), self.rules.max_attempts)
        return [(number,) for number in range(attempt, ahead) if number not in self.drawn]

    def request(self, draw: Draw, writer: Writer) -> Request:
        language = self.record["language"]
        examples = {f"example_{i}": shot["prompt"] for i, shot in enumerate(self.shots, start=1)}
        # The examples stand in the model's own turn, so the third instruction is a continuation of what it "wrote".
        prefill, stop = fill("instruct_prefill", language, **examples), item_ends(self.shots, language)
        ask = fill("instruct", language)
        return writer.request(self.id, draw, ask, prefill, limit=INSTRUCTION_TOKENS, stop=stop)

    def examine(self, draw: Draw, sample: Sample, writer: Writer) -> Entry:
        prompt, reason = examine_instruction(sample.text, sample.finish, self.record["language"])
        return {"id": self.id, "attempt": draw[0], "prompt": prompt, "reason": reason, "tokens": sample.num_tokens}

    def unscored(self) -> list[Draw]:
        return [(attempt,) for attempt in self.drawn if self.verdict(attempt) is None]

    def questions(self, draw: Draw, writer: Writer) -> list[Pair]:
        """Does it suit a long article? (prompt ids, yes) and (prompt ids, no); [] where they do not fit the context."""
        language = self.record["language"]
        question = fill("judge", language, instruction=self.drawn[draw[0]][0], words=str(self.rules.long_words))
        prompt_ids, own = writer.encode(question), languages.language(language)
        answers = [writer.chat.encode_text(word) for word in (own.yes, own.no)]
        # The answer's ids must fit too, since they are read together with the question.
        fits = len(prompt_ids) + max(map(len, answers)) <= writer.sampler.context
        return [(prompt_ids, answer) for answer in answers] if fits else []

    def examine_scores(self, draw: Draw, sums: list[float]) -> Entry:
        return {"id": self.id, "attempt": draw[0], "margin": sums[0] - sums[1] if sums else DOES_NOT_FIT}

    def apply(self, entry: Entry) -> None:
        if "margin" in entry:
            self.margins[entry["attempt"]] = entry["margin"]
        else:
            self.drawn[entry["attempt"]] = entry["prompt"], entry["reason"]

    @property
    def ready(self) -> bool:
        return self.verdict(self.attempt) is not None

    def take_turn(self) -> str:
        prompt, reason = self.drawn[self.attempt][0], self.verdict(self.attempt) or ""
        if not reason and not self.distinct.add(prompt, self.record["language"]):
            # Not called "near-duplicate": that is the reason of a whole-file decision, which a resume undoes.
            reason = "duplicate"
        if reason and self.attempt + 1 < self.rules.max_attempts:
            self.attempt += 1
        else:  # the last attempt's text is kept also when it failed: X.rejected.jsonl shows what was written
            self.reason = reason
            self.record |= {"attempt": self.attempt, "prompt": prompt, "prompt_words": count_words(prompt)}
        return reason

    def restore(self, stored: dict, attempts: int) -> None:
        reason = stored.get("reason", "")
        if reason and reason not in HOPELESS and stored["attempt"] + 1 < self.rules.max_attempts:
            self.attempt = stored["attempt"] + 1
        else:
            self.reason = reason
        if not reason:
            self.distinct.add(stored["prompt"], self.record["language"])

    def outcome(self) -> tuple[dict, str]:
        return self.record, self.reason or ""


def instructions(stage: Stage, rules: InstructionsFlags) -> None:
    # 1) seeds, and one task per wanted instruction
    seeds = filter_language(read_prompts(rules.seeds, source="seed"), stage.out.language)
    # The run's name and iteration are part of the ids, so each iteration asks for instructions of its own.
    run_id, distinct, tasks = run_id_of(stage.out.output), NearDuplicates(), []
    for sample, language in enumerate(split_count(rules.count, seeds, smaller_values(stage, "count", rules.count))):
        id_ = record_id("instruction", "", sample, scope=run_id)
        shots = draw_shots(id_, language, seeds)
        base = {"id": id_, "language": language, "run_id": run_id, "sample": sample, "source": "self-instruct"}
        record = new_record("instruction", **base, example_ids=[shot["id"] for shot in shots])
        tasks.append(NewInstruction(record, shots, rules, distinct))
    # The files count by their contents, as inputs of the job; the other flags by value.
    settings = {k: getattr(rules, k) for k in ("count", "max_attempts", "judge_margin", "long_words")}
    settings["templates"] = template_hashes(stage.out.language, "instruct", "instruct_prefill", "judge")
    with open_job("instructions", stage, [*rules.seeds, *rules.dedup_against], settings) as job:
        stats = {}
        if not job.complete:
            if moved := {record["run_id"] for record in job.records} - {run_id}:  # all would be asked for anew
                raise job.refuse(
                    f"{stage.out.output} was begun as {moved.pop()} and is {run_id} now: ids hold that name",
                    f"give the folder its name back, or start afresh with {cli.spelt('--overwrite')}",
                )
            # 2) draw, judge and compare, until there are --count or all attempts are used up
            for known in [*seeds, *(read_prompts(rules.dedup_against) if rules.dedup_against else [])]:
                distinct.add(known["prompt"], known["language"])
            stats = run_tasks(job, tasks, lambda: open_writer(stage, job), "instructions").statistics()
        summary = job.finish(**stats)
    cli.emit(summary)


# ---------------------------------------------------------------------------------------------------------
# 3, 4: responses


class Draft(Redraw[Writer, Sample]):
    """An answer to an instruction, by the Generator."""

    def request(self, draw: Draw, writer: Writer) -> Request:
        # The bare instruction, without a word about length: as it is trained, and as it is evaluated.
        return writer.request(self.id, draw, self.record["prompt"])

    def read(self, sample: Sample, writer: Writer) -> tuple[dict, str]:
        text, reason = clean_answer(sample.text, sample.finish, self.record["language"])
        # Words of the cleaned text, tokens of what was drawn (EOS included).
        fields = {"response": text, "response_words": count_words(text), "response_tokens": sample.num_tokens}
        return {**fields, "finish": sample.finish}, reason


def responses(stage: Stage, inputs: list[str], rules: ResponsesFlags) -> None:
    # 1) --samples answers to each instruction. Their ids depend on the instruction's and on the number of the sample
    #    only, so the same command finds its records again.
    run_id, tasks = run_id_of(stage.out.output), []
    for parent in filter_language(read_prompts(inputs), stage.out.language):
        for sample in range(rules.samples):
            id_ = record_id("response", parent["id"], sample)
            base = {"id": id_, "parent_id": parent["id"], "language": parent["language"], "run_id": run_id}
            record = new_record("response", **base, sample=sample, prompt=parent["prompt"])
            tasks.append(Draft(record, rules.max_attempts))
    with open_job("responses", stage, inputs, vars(rules)) as job:
        stats = {}
        if not job.complete:
            # 2) draw until the filters pass
            stats = run_tasks(job, tasks, lambda: open_writer(stage, job), "answers").statistics()
            # 3) only now, because the rank of an answer depends on all others
            if not rules.no_length_bias:
                job.drop(length_bias_drops(job.records, stage.out.seed, stage.out.min_yield))
        summary = job.finish(**stats)
    cli.emit(summary)


# ---------------------------------------------------------------------------------------------------------
# 5: constrain


class Demand(Redraw[Writer, Sample]):
    """A length demand that is to be written into an instruction. Its `query` is that instruction with the demand."""

    def request(self, draw: Draw, writer: Writer) -> Request:
        fields = {"instruction": self.record["prompt"], "constraint": self.record["constraint"]}
        # Tokens: enough for a rewritten instruction, and an answer in its place is cut early.
        limit = 3 * count_words(self.record["prompt"]) + 64
        return writer.request(self.id, draw, fill("constrain", self.record["language"], **fields), limit=limit)

    def read(self, sample: Sample, writer: Writer) -> tuple[dict, str]:
        """The rewritten instruction states the demand, in its language, at a sane length."""
        language, prompt_words = self.record["language"], count_words(self.record["prompt"])
        query = clean_instruction(strip_chatter(sample.text, language)[0], language)
        reason = finish_reason(sample.finish)
        # An answer in place of the instruction is far longer, a fragment far shorter; 30 words: room for the demand.
        if not reason and not prompt_words / 2 <= count_words(query) <= 2 * prompt_words + 30:
            reason = "words"
        elif not reason and detect_language(query) != language:
            reason = "language"
        elif not reason and not states_demand(query, *demand_of(self.record), language):
            reason = "demand"
        return {"query": query}, reason

    def last_resort(self, record: dict, reason: str) -> tuple[dict, str]:
        return append_demand(record, reason)


def append_demand(record: dict, reason: str) -> tuple[dict, str]:
    """The demand in a sentence of its own; not after a prompt with another demand, which stays rejected."""
    # Plain, so that text.demands reads exactly this demand back.
    sentence = languages.language(record["language"]).demand.sentence
    query = sentence.format(prompt=record["prompt"].rstrip(), constraint=record["constraint"])
    # states_demand wants this demand and no other: two would contradict each other.
    if not states_demand(query, *demand_of(record), record["language"]):
        return record, reason
    return {**record, "query": query, "attempt": -1}, ""  # -1: by no draw


def demand_of(record: dict) -> tuple[str, int, int]:
    return record["type"], record["min_words"], record["max_words"]


def make_demands(answers: list[dict], run_id: str, seed: int, rules: ConstrainFlags) -> list[Demand]:
    """A demand per pair of prompt and answer, true of the answer; a pair that came before is left out."""
    tasks, seen = [], set()
    same_id: Counter[str] = Counter()
    for parent in answers:
        if (parent["prompt"], parent["response"]) in seen:
            continue
        seen.add((parent["prompt"], parent["response"]))
        language, words = parent["language"], count_words(parent["response"])
        # Two files may hold the same id with different answers (one prompt file used twice): number them.
        sample = same_id[parent["id"]]
        same_id[parent["id"]] += 1
        id_ = record_id("constrained", parent["id"], sample)
        base = {"id": id_, "parent_id": parent["id"], "language": language, "run_id": run_id, "sample": sample}
        kept = {"prompt": parent["prompt"], "response": parent["response"], "response_words": words}
        tokens, origin = parent.get("response_tokens", -1), "extended" if "initial" in parent else "response"
        record = new_record("constrained", **base, **kept, response_tokens=tokens, origin=origin)
        # A seed of its own: the demand does not depend on which other answers are there.
        rng, low, high = random.Random(draw_seed(seed, id_, 0)), rules.demand_min, rules.demand_max
        demand = make_demand(words, language, rng, low=low, high=high, steps=rules.demand_steps)
        if demand:
            record |= dict(zip(("constraint", "type", "min_words", "max_words"), demand, strict=True))
            tasks.append(Demand(record, rules.max_attempts))
        else:  # rejected without a draw: between --demand-min and --demand-max, but no round number is true of it
            tasks.append(Demand(record, 0, "no-demand" if low <= words < high else "outside-demand"))
    return tasks


def constrain(stage: Stage, inputs: list[str], rules: ConstrainFlags) -> None:
    # 1) each answer with its demand. Several files are one list: this is how the training set of the run is collected.
    answers = [row for path in inputs for row in read_answers(path)]
    answers = filter_language(answers, stage.out.language)
    tasks = make_demands(answers, run_id_of(stage.out.output), stage.out.seed, rules)
    settings = {**vars(rules), "templates": template_hashes(stage.out.language, "constrain")}
    with open_job("constrain", stage, inputs, settings) as job:
        stats = {}
        if not job.complete:
            # 2) written in by the model, else appended
            stats = run_tasks(job, tasks, lambda: open_writer(stage, job), "demands").statistics()
            # How many the model did not manage, of those accepted.
            stats["appended"] = sum(record["attempt"] == -1 for record in job.records)
        summary = job.finish(**stats)
    cli.emit(summary)


# ---------------------------------------------------------------------------------------------------------


COMMANDS = {
    "instructions": (InstructionsFlags, "self-instruct from seeds, judged and without near-duplicates"),
    "responses": (ResponsesFlags, "draft answers to instructions, filtered, the shortest dropped"),
    "constrain": (ConstrainFlags, "collect answers and write a true length demand into each instruction"),
}


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, "generate.py")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (own, help) in COMMANDS.items():
        sub = cli.add_command(commands, name, help)
        if name != "instructions":  # it has --seeds
            cli.add_flags(sub, "input", InputFlags)
        cli.add_flags(sub, "output", OutputFlags)
        cli.add_flags(sub, "selection", own)
        # Only drafts are the trained Generator's; the other two steps are the base model's.
        cli.add_flags(sub, "model", ModelFlags, leave_out=() if name == "responses" else ("adapter",))
        cli.add_flags(sub, "sampling", SamplingFlags)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    stage = Stage(cli.take(args, OutputFlags), cli.take(args, ModelFlags), cli.take(args, SamplingFlags))
    match args.command:
        case "instructions":
            instructions(stage, cli.take(args, InstructionsFlags))
        case "responses":
            responses(stage, args.input, cli.take(args, ResponsesFlags))
        case "constrain":
            constrain(stage, args.input, cli.take(args, ConstrainFlags))


if __name__ == "__main__":
    cli.run(main)
