"""The Generator's part of Self-Lengthen: invent instructions, draft answers, weave length demands into instructions.

Three commands, each one step of the method (arXiv 2410.23933):

instructions  1. The BASE model sees two seed instructions and writes a third, as a continuation of its own turn.
              2. It judges whether that instruction suits a long article; 3 < words < 500, right language, not a
                 near-duplicate of a seed, of --dedup-against, or of an instruction before it.
responses     3. The Generator answers each instruction --samples times; one that fails the filters is drawn again.
              4. Length bias: the shortest fifth of the answers always goes, 40.5 % go on average.
constrain     5. A length demand that is true of the answer is woven into its instruction by the BASE model, checked,
                 and drawn again; at last it is appended in one plain sentence. Several files in = this also collects.

Reads and writes JSONL: seeds -> instructions.jsonl -> responses.jsonl; responses.jsonl + extended.jsonl ->
constrained.jsonl. Beside X.jsonl: X.rejected.jsonl with a `reason`, X.meta.json, and X.work.jsonl while it runs.

Departures from the paper and its release:
 1. One tree for both languages: templates, filters and word measures follow each record's language.
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
from dataclasses import dataclass

from lengthen import cli
from lengthen.cli import REQUIRED, InputFlags, ModelFlags, OutputFlags, SamplingFlags, at_least, flag
from lengthen.models.chat import fill, template_hashes
from lengthen.records import (
    UserError,
    draw_seed,
    filter_language,
    new_record,
    read_answers,
    read_prompts,
    record_id,
    run_id_of,
)
from lengthen.sampling.request import Request, Sample
from lengthen.stage import Stage, Writer, length_bias_drops, open_job, open_writer
from lengthen.tasks import Draw, Entry, Pair, Redraw, Task, run_tasks
from lengthen.text.demands import make_demand, states_demand
from lengthen.text.filters import clean_answer, finish_reason, strip_chatter
from lengthen.text.selection import NearDuplicates
from lengthen.text.words import count_words, detect_language

MIN_INSTRUCTION_WORDS, MAX_INSTRUCTION_WORDS = 3, 500  # both exclusive, as in the release
INSTRUCTION_TOKENS = 1024  # enough for 500 words; an instruction that does not end would else fill the context
DOES_NOT_FIT = -1e9  # nats: the margin of an instruction whose question is longer than the context, a no
RETRIES = 2  # draws at a time for an instruction whose first one failed: one by one, the last few take the longest
NEXT_NUMBER = {"en": "\nInstruction 4", "zh": "\n指令4"}
YES_NO = {"en": ("Yes", "No"), "zh": ("是", "否")}
APPENDED = {"en": "{prompt} Please write {constraint}.", "zh": "{prompt}请写{constraint}。"}

# ---------------------------------------------------------------------------------------------------------
# The flags of each command, beside those that every stage has (lengthen/cli.py)


def steps(text: str) -> tuple[int, int]:
    """'1000,2000' -> (1000, 2000)."""
    found = re.fullmatch(r"([1-9]\d*),([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"must be two numbers like 1000,2000, got {text!r}")
    return int(found[1]), int(found[2])


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


# ---------------------------------------------------------------------------------------------------------
# 1, 2: instructions

# What models put before and behind an instruction when they continue the list: its number, a label, an answer.
_LABEL = re.compile(r"^\W*(?:instruction|prompt|task|指令|题目)\s*\d*\s*[:：.]\W*|^\d+[.:、)]\s*", re.IGNORECASE)
_ANSWER = re.compile(r"\n\W*(?:(?:response|answer|output|solution|example)\W*:|(?:回答|答案|输出|示例)\W*[:：])", re.I)
_QUOTES = {'"': '"', "“": "”", "'": "'", "「": "」", "『": "』", "**": "**", "*": "*"}


def clean_instruction(text: str) -> str:
    """The instruction alone: no number or label before it, no quotes or emphasis around it, no answer behind it."""
    text = _LABEL.sub("", _ANSWER.split("\n" + text)[0].strip()).strip()
    for left, right in _QUOTES.items():
        inside = text[len(left) : -len(right)]
        if text.startswith(left) and text.endswith(right) and inside and left not in inside:
            return inside.strip()
    return text


def examine_instruction(text: str, finish: str, language: str) -> tuple[str, str]:
    """Return (instruction, reason): "" = worth a judgement."""
    instruction = clean_instruction(text)
    if reason := finish_reason(finish, ends=("eos", "stop")):
        return instruction, reason
    if not MIN_INSTRUCTION_WORDS < count_words(instruction) < MAX_INSTRUCTION_WORDS:
        return instruction, "words"
    return instruction, "" if detect_language(instruction) == language else "language"


def item_ends(shots: list[dict], language: str) -> tuple[str, ...]:
    """Stop strings: the next number; and a blank line, where the shots have none inside.

    Small models go on behind it with remarks about the list ("Note: these instructions …"): 12 of 15 of SmolLM2's did.
    """
    has_blank_line = any("\n\n" in shot["prompt"].strip() for shot in shots)
    return (NEXT_NUMBER[language],) if has_blank_line else (NEXT_NUMBER[language], "\n\n")


def split_count(count: int, seeds: list[dict]) -> list[str]:
    """One language per wanted instruction, in proportion to the seeds' languages (all "en" before all "zh")."""
    num_en = round(count * sum(s["language"] == "en" for s in seeds) / len(seeds))
    return ["en"] * num_en + ["zh"] * (count - num_en)


def draw_shots(record_id_: str, language: str, seeds: list[dict]) -> list[dict]:
    """The two examples of a record: the same on every machine and in every attempt."""
    same = sorted((s for s in seeds if s["language"] == language), key=lambda s: s["id"])
    if len(same) < 2:
        raise UserError(f"two seeds of language {language!r} are needed, found {len(same)}", "--seeds FILE [FILE ...]")
    return random.Random(record_id_).sample(same, 2)


class Invention(Task[Writer, Sample]):
    """An instruction in the making. Its draws finish in any order; near-duplicates are decided when its turn comes."""

    in_turn = True

    def __init__(self, record: dict, shots: list[dict], rules: InstructionsFlags, distinct: NearDuplicates):
        self.record, self.shots, self.rules = record, shots, rules
        self.distinct = distinct  # shared by all: the seeds, and what was kept so far
        self.drawn: dict[int, tuple[str, str]] = {}  # attempt -> (instruction, reason; "" = worth a judgement)
        self.margins: dict[int, float] = {}  # attempt -> log p(yes) - log p(no), nats
        self.attempt = 0  # the one whose turn is next
        self.reason = ""  # why the last one failed
        self._over = False

    @property
    def over(self) -> bool:
        return self._over

    def verdict(self, attempt: int) -> str | None:
        """A reason, "" = passed (near-duplicates are not known before its turn), None = not known yet."""
        if attempt not in self.drawn:
            return None
        reason, no_judge = self.drawn[attempt][1], self.rules.judge_margin == float("-inf")
        if reason or no_judge:
            return reason
        if attempt not in self.margins:
            return None
        return "" if self.margins[attempt] > self.rules.judge_margin else "judge"

    def draws(self) -> list[Draw]:
        """The next draws are asked for as soon as one is known to have failed: its turn may be far away."""
        attempt = self.attempt
        while self.verdict(attempt) and attempt + 1 < self.rules.max_attempts:
            attempt += 1
        if self.over or self.verdict(attempt) == "":
            return []  # nothing to do but to wait for its turn
        ahead = min(attempt + (RETRIES if attempt else 1), self.rules.max_attempts)
        return [(number,) for number in range(attempt, ahead) if number not in self.drawn]

    def request(self, draw: Draw, writer: Writer) -> Request:
        language = self.record["language"]
        examples = {f"example_{i}": shot["prompt"] for i, shot in enumerate(self.shots, start=1)}
        prefill, stop = fill("instruct_prefill", language, **examples), item_ends(self.shots, language)
        ask = fill("instruct", language)
        return writer.request(self.id, draw, ask, prefill, limit=INSTRUCTION_TOKENS, stop=stop)

    def examine(self, draw: Draw, sample: Sample, writer: Writer) -> Entry:
        prompt, reason = examine_instruction(sample.text, sample.finish, self.record["language"])
        return {"id": self.id, "attempt": draw[0], "prompt": prompt, "reason": reason, "tokens": sample.num_tokens}

    def unscored(self) -> list[Draw]:
        return [(attempt,) for attempt in self.drawn if self.verdict(attempt) is None]

    def questions(self, draw: Draw, writer: Writer) -> list[Pair]:
        """Does it suit a long article? Yes and no, each as the answer; none for a question that does not fit."""
        language = self.record["language"]
        question = fill("judge", language, instruction=self.drawn[draw[0]][0], words=str(self.rules.long_words))
        prompt_ids = writer.encode(question)
        answers = [writer.chat.encode_text(word) for word in YES_NO[language]]
        fits = len(prompt_ids) + max(map(len, answers)) <= writer.loaded.context
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
        prompt, self.reason = self.drawn[self.attempt][0], self.verdict(self.attempt) or ""
        if not self.reason and not self.distinct.add(prompt, self.record["language"]):
            # Not called "near-duplicate": that is the reason of a whole-file decision, which a resume undoes.
            self.reason = "duplicate"
        if not self.reason or self.attempt + 1 == self.rules.max_attempts:
            self.record |= {"attempt": self.attempt, "prompt": prompt, "prompt_words": count_words(prompt)}
            self._over = True
        else:
            self.attempt += 1
        return self.reason

    def outcome(self) -> tuple[dict, str]:
        return self.record, self.reason


def instructions(stage: Stage, rules: InstructionsFlags) -> None:
    # 1) seeds, and one task per wanted instruction
    seeds = filter_language(read_prompts(rules.seeds, source="seed"), stage.out.language)
    if not seeds:
        raise UserError(f"no seed is of language {stage.out.language!r}", "--language both, or other --seeds")
    run_id, distinct, tasks = run_id_of(stage.out.output), NearDuplicates(), []
    for sample, language in enumerate(split_count(rules.count, seeds)):
        id_ = record_id("instruction", "", sample, scope=run_id)
        shots = draw_shots(id_, language, seeds)
        base = {"id": id_, "language": language, "run_id": run_id, "sample": sample, "source": "self-instruct"}
        record = new_record("instruction", **base, example_ids=[shot["id"] for shot in shots])
        tasks.append(Invention(record, shots, rules, distinct))
    settings = {
        **{k: getattr(rules, k) for k in ("count", "max_attempts", "judge_margin", "long_words")},
        "templates": template_hashes("instruct", "instruct_prefill", "judge"),
    }
    with open_job("instructions", stage, [*rules.seeds, *rules.dedup_against], settings) as job:
        stats = {}
        if not job.complete:
            # 2) draw, judge and compare until the count is reached
            for known in [*seeds, *(read_prompts(rules.dedup_against) if rules.dedup_against else [])]:
                distinct.add(known["prompt"], known["language"])
            stats = run_tasks(job, tasks, lambda: open_writer(stage, job), "instructions").statistics()
        summary = job.finish(stage.out.min_yield, **stats)
    cli.emit(summary)


# ---------------------------------------------------------------------------------------------------------
# 3, 4: responses


class Draft(Redraw[Writer, Sample]):
    """An answer to an instruction, by the Generator."""

    def request(self, draw: Draw, writer: Writer) -> Request:
        return writer.request(self.id, draw, self.record["prompt"])

    def read(self, sample: Sample, writer: Writer) -> tuple[dict, str]:
        text, reason = clean_answer(sample.text, sample.finish, self.record["language"])
        fields = {"response": text, "response_words": count_words(text), "response_tokens": sample.num_tokens}
        return {**fields, "finish": sample.finish}, reason


def responses(stage: Stage, inputs: list[str], rules: ResponsesFlags) -> None:
    # 1) --samples tasks per instruction
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
            # 3) the shortest go, once all are there
            if not rules.no_length_bias:
                job.drop(length_bias_drops(job.records, stage.out.seed))
        summary = job.finish(stage.out.min_yield, **stats)
    cli.emit(summary)


# ---------------------------------------------------------------------------------------------------------
# 5: constrain


class Demand(Redraw[Writer, Sample]):
    """A length demand to be woven into an instruction; `reason` of an answer that gets none is there from the start."""

    def __init__(self, record: dict, max_attempts: int, reason: str):
        super().__init__(record, max_attempts)
        self.without = self.reason = reason

    @property
    def over(self) -> bool:
        return bool(self.without) or super().over

    def request(self, draw: Draw, writer: Writer) -> Request:
        fields = {"instruction": self.record["prompt"], "constraint": self.record["constraint"]}
        limit = 3 * count_words(self.record["prompt"]) + 64  # tokens: a rewritten instruction, not an answer
        return writer.request(self.id, draw, fill("constrain", self.record["language"], **fields), limit=limit)

    def read(self, sample: Sample, writer: Writer) -> tuple[dict, str]:
        """The rewritten instruction states the demand, in its language, at a sane length."""
        language, prompt_words = self.record["language"], count_words(self.record["prompt"])
        query = clean_instruction(strip_chatter(sample.text, language)[0])
        reason = finish_reason(sample.finish)
        if not reason and not prompt_words / 2 <= count_words(query) <= 2 * prompt_words + 30:
            reason = "words"  # an answer, or a fragment
        elif not reason and detect_language(query) != language:
            reason = "language"
        elif not reason and not states_demand(query, *demand_of(self.record), language):
            reason = "demand"
        return {"query": query}, reason

    def last_resort(self, record: dict, reason: str) -> tuple[dict, str]:
        return (record, reason) if self.without else append_demand(record, reason)


def append_demand(record: dict, reason: str) -> tuple[dict, str]:
    """The demand in a sentence of its own; not after a prompt with another demand, which stays rejected."""
    template = APPENDED[record["language"]]
    query = template.format(prompt=record["prompt"].rstrip(), constraint=record["constraint"])
    if not states_demand(query, *demand_of(record), record["language"]):
        return record, reason
    return {**record, "query": query, "attempt": -1}, ""


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
        # Two files may hold the same id with other answers (one prompt file used twice): number them.
        sample = same_id[parent["id"]]
        same_id[parent["id"]] += 1
        id_ = record_id("constrained", parent["id"], sample)
        base = {"id": id_, "parent_id": parent["id"], "language": language, "run_id": run_id, "sample": sample}
        kept = {"prompt": parent["prompt"], "response": parent["response"], "response_words": words}
        tokens, origin = parent.get("response_tokens", -1), "extended" if "initial" in parent else "response"
        record = new_record("constrained", **base, **kept, response_tokens=tokens, origin=origin)
        rng, low, high = random.Random(draw_seed(seed, id_, 0)), rules.demand_min, rules.demand_max
        demand = make_demand(words, language, rng, low=low, high=high, steps=rules.demand_steps)
        reason = "" if demand else "no-demand" if low <= words < high else "outside-demand"
        if demand:
            record |= dict(zip(("constraint", "type", "min_words", "max_words"), demand, strict=True))
        tasks.append(Demand(record, rules.max_attempts, reason))
    return tasks


def constrain(stage: Stage, inputs: list[str], rules: ConstrainFlags) -> None:
    # 1) all answers there are, each with a demand
    answers = [row for path in inputs for row in read_answers(path)]
    answers = filter_language(answers, stage.out.language)
    tasks = make_demands(answers, run_id_of(stage.out.output), stage.out.seed, rules)
    settings = {**vars(rules), "templates": template_hashes("constrain")}
    with open_job("constrain", stage, inputs, settings) as job:
        stats = {}
        if not job.complete:
            # 2) woven in by the model, else appended
            stats = run_tasks(job, tasks, lambda: open_writer(stage, job), "demands").statistics()
            stats["appended"] = sum(record["attempt"] == -1 for record in job.records)
        summary = job.finish(stage.out.min_yield, **stats)
    cli.emit(summary)


# ---------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, "generate.py")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sub = cli.add_command(commands, "instructions", "self-instruct from seeds, judged and without near-duplicates")
    cli.add_flags(sub, "output", OutputFlags)
    cli.add_flags(sub, "selection", InstructionsFlags)
    cli.add_flags(sub, "model", ModelFlags, leave_out=("adapter",))  # self-instruct is the base model's
    cli.add_flags(sub, "sampling", SamplingFlags)

    sub = cli.add_command(commands, "responses", "draft answers to instructions, filtered, the shortest dropped")
    cli.add_flags(sub, "input", InputFlags)
    cli.add_flags(sub, "output", OutputFlags)
    cli.add_flags(sub, "selection", ResponsesFlags)
    cli.add_flags(sub, "model", ModelFlags)
    cli.add_flags(sub, "sampling", SamplingFlags)

    help = "collect answers and weave a true length demand into each instruction"
    sub = cli.add_command(commands, "constrain", help)
    cli.add_flags(sub, "input", InputFlags)
    cli.add_flags(sub, "output", OutputFlags)
    cli.add_flags(sub, "selection", ConstrainFlags)
    cli.add_flags(sub, "model", ModelFlags, leave_out=("adapter",))
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
