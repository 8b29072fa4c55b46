"""How much each stage of a run will write, read and train on: arithmetic on its settings and on named assumptions.

Nobody knows beforehand how many drafts pass the filters, or how long a model's answers are. So each such number is an
assumption with three values, the cheap one, the likely one and the dear one, and a source: most are the yields of the
demo (SmolLM2-135M, docs/results.md) and of the study's pilot (docs/study.md). `work_of` follows the records through the
steps under one choice of values; lengthen/costs/forecast.py compares several choices, and puts what finished stages
have measured in the place of what was assumed.

Lengths are log-normal: a median, and SPREAD. An answer that reaches its token limit is cut there and does not count.
No torch here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

from lengthen.evaluation.benchmark import BENCHMARKS, find_benchmark, read_rows
from lengthen.reading import filter_language
from lengthen.sampling.request import Sampling
from lengthen.steps import Step

# Standard deviation of the logarithm of an answer's length: of the pilot's 68 % exceed 360 tokens, 27 % 560.
SPREAD = 0.45
# Of `tries`, for drafts: of the pilot's 30 % (58 %) passed at once, of the others 15 % (48 %) after that.
ALIKE = 2.0
TOKENS_PER_WORD = 1.35  # of English prose, for most tokenizers
INSTRUCTION_LIMIT = 1024  # generate.INSTRUCTION_TOKENS
HUB_QUERIES = 240  # of a benchmark that is not here to be counted: LonGen's
KEPT_BY_BIAS = 0.595  # the length bias drops 40.5 % on average, the short ones, ...
LONGER_BY_BIAS = 1.1  # ... so what stays is longer: of the demo's drafts 1.06 to 1.14 times
FIXED = (
    f"lengths are log-normal with a spread of {SPREAD}; {TOKENS_PER_WORD} tokens per word; "
    f"the length bias keeps {KEPT_BY_BIAS:.1%}, {LONGER_BY_BIAS} times as long"
)
# Tokens of prompts, by the templates of prompts/ and SmolLM2's tokenizer; the texts they hold are added.
CHAT, SELF_INSTRUCT, JUDGE, EXTEND, CONSTRAIN, QUERY = 35, 160, 110, 130, 130, 60


class Assumption(NamedTuple):
    """One number that only a run can tell: as it is where the run is cheap, likely, and where it is dear."""

    low: float
    likely: float
    high: float
    text: str  # what it is, and its unit
    source: str

    @property
    def values(self) -> tuple[float, float, float]:
        return self.low, self.likely, self.high

    def __str__(self) -> str:
        low, likely, high = (f"{value:,.0f}" if value >= 10 else f"{value:.2g}" for value in self.values)
        return f"{self.text}: {likely} ({low} to {high}); {self.source}"


LENGTHS = ("instruction", "answer", "growth", "demand", "gain")  # how much is written; the others: how much passes


def assumptions(parameters: float) -> dict[str, Assumption]:
    """All of them, for a model of so many parameters."""
    # A straight line in the logarithm of the size, between the two models of which something is known.
    share = min(1.0, max(0.0, math.log(parameters / 0.135e9) / math.log(7e9 / 0.135e9)))

    def by_size(small: float, large: float) -> float:
        return small * (large / small) ** share

    answer, growth = by_size(420, 1350), by_size(1.1, 2.0)
    known = "SmolLM2: 420, measured; a 7B model: 1,000 words, by the paper; between them by size"
    demo = "the demo and the pilot"
    return {
        "instruction": Assumption(35, 45, 80, "tokens of a new instruction, as drawn", f"{demo}: 41 to 47"),
        "judged": Assumption(0.7, 0.4, 0.28, "share of drawn instructions that are kept", f"{demo}: 0.3 to 0.5"),
        "answer": Assumption(0.75 * answer, answer, 1.5 * answer, "tokens of an answer, median", known),
        "growth": Assumption(
            1.0, growth, max(1.3, growth), "times longer after each training", "study: 1.02 to 1.17; paper, 7B: 2"
        ),
        "filters": Assumption(0.97, 0.88, 0.75, "share of ended drafts that pass the filters", f"{demo}: 0.82 to 0.91"),
        "stage": Assumption(0.92, 0.85, 0.75, "share of stages that the next one can go on from", f"{demo}: 0.83-0.87"),
        "extended": Assumption(0.65, 0.39, 0.2, "share of tries of an extension that pass", f"{demo}: 0.25 to 0.43"),
        "gain": Assumption(1.5, 1.75, 2.0, "times longer after the first round; 1.2 for each more", f"{demo}: 1.6-1.9"),
        "woven": Assumption(
            0.9, 0.3, 0.0, "share of draws that weave a demand in", "the demo: 0; larger models: guessed"
        ),
        "demand": Assumption(60, 105, 150, "tokens of an instruction with its demand, as drawn", "the demo: 95 to 125"),
        "asked": Assumption(1.1, 1.25, 1.6, "times longer where a length is asked for", "the demo, 7 % to 40 % longer"),
    }


# ---------------------------------------------------------------------------------------------------------
# Lengths and tries


def _below(median: float, limit: float) -> float:
    """The share of texts that end before the limit."""
    return NormalDist().cdf(math.log(limit / median) / SPREAD)


def _sum_below(median: float, limit: float) -> float:
    """What the texts that end before the limit add to the mean, tokens."""
    return median * math.exp(SPREAD**2 / 2) * NormalDist().cdf((math.log(limit / median) - SPREAD**2) / SPREAD)


def written(median: float, limit: float) -> float:
    """Mean tokens of a text that is cut at the limit."""
    return _sum_below(median, limit) + limit * (1 - _below(median, limit))


def of_the_ended(median: float, limit: float) -> float:
    """Mean tokens of the texts that end before the limit."""
    return _sum_below(median, limit) / max(1e-9, _below(median, limit))


def longest(median: float, limit: float, texts: float) -> float:
    """Tokens of the longest of so many texts."""
    return min(limit, median * math.exp(SPREAD * NormalDist().inv_cdf(1 - 0.5 / max(1.0, texts))))


def tries(passing: float, wanted: int, most: int, alike: float = math.inf) -> tuple[float, float, float]:
    """(tries until `wanted` have passed or `most` are used up, share of tasks with one that passed, passed on average).

    passing: the share of first tries that pass. alike: how much tasks differ, as the a + b of a beta distribution of
    that share; what failed once is then likelier to fail again. inf = tries are independent of each other.
    """
    left, used, passed = [1.0] + [0.0] * wanted, 0.0, 0.0  # left[k]: the share of tasks with k passed
    for n in range(most):
        open_ = left[:wanted]
        if sum(open_) < 1e-6:
            break
        weight = 0.0 if math.isinf(alike) else n / (alike + n)  # of what a task's own tries have shown
        rates = [(1 - weight) * passing + weight * (k / n if n else 0.0) for k in range(wanted)]
        pass_now = [share * rate for share, rate in zip(open_, rates, strict=True)]
        used, passed = used + sum(open_), passed + sum(pass_now)
        for k, share in enumerate(pass_now):
            left[k] -= share
        for k, share in enumerate(pass_now):
            left[k + 1] += share
    return used, 1 - left[0], passed


# ---------------------------------------------------------------------------------------------------------
# The steps


@dataclass(frozen=True)
class Work:
    """What one step does, on average."""

    calls: float = 0.0  # samples drawn; of a training: optimizer steps
    tokens: float = 0.0  # drawn, or trained on (prompts included)
    read: float = 0.0  # prompt tokens that sampling computes once, and texts that it scores
    length: float = 0.0  # tokens of one text with its prompt, on average
    serial: float = 0.0  # tokens that cannot be drawn side by side: of the longest chain of calls
    longest: float = 0.0  # tokens of the longest text with its prompt
    targets: float = 0.0  # share of a training's tokens that are learned
    records: float = 0.0  # accepted
    answer: float = 0.0  # tokens of one of them, on average
    draft: float = 0.0  # tokens of what it was extended from
    per_instruction: float = 1.0  # records for each instruction


@dataclass
class Flow:
    """The records on their way: what is known of each file and folder that steps write."""

    values: Mapping[str, float]  # of the assumptions, by name
    context: int  # the longest text of the model, tokens
    made: dict[str, Work] = field(default_factory=dict)  # by output
    trained: dict[str, int] = field(default_factory=dict)  # adapter -> trainings behind it

    def habit(self, step: Step) -> float:
        """Median tokens of what the step's model writes in one call."""
        return self.values["answer"] * self.values["growth"] ** self.trained.get(step.settings.get("adapter", ""), 0)

    def limit(self, flags: Mapping[str, Any], own: float = Sampling.max_new_tokens) -> float:
        return min(flags["max_new_tokens"] or own, self.context)

    def read_from(self, flags: Mapping[str, Any]) -> Work:
        """The records of the step's inputs together: sums, and means over them. What no step writes is counted."""
        own = self.values["answer"]
        inputs = [self.made.get(path) or Work(records=_lines(path), answer=own) for path in flags["input"]]
        records = sum(work.records for work in inputs)

        def mean(name: str) -> float:
            return sum(getattr(work, name) * work.records for work in inputs) / max(1e-9, records)

        each = mean("per_instruction") or 1.0
        return Work(records=records, answer=mean("answer"), draft=mean("draft"), per_instruction=each)


def work_of(step: Step, flags: Mapping[str, Any], flow: Flow) -> Work:
    """What a step does. flags: its settings, with the stage's defaults where none is given."""
    stage = {"train.py": _train, "evaluate.py": _evaluate, "extend.py": _extend}.get(step.command[0])
    stage = stage or {"instructions": _instructions, "responses": _responses, "constrain": _constrain}[step.name]
    work = stage(step, flags, flow)
    if step.command[0] == "train.py":
        flow.trained[step.output] = flow.trained.get(flags.get("adapter", ""), 0) + 1
    return work


def sampling(calls: float, mean: float, read: float, length: float, serial: float, longest: float) -> Work:
    """Work of a stage that draws. mean and read: tokens drawn and read per call; the others as in Work."""
    return Work(calls=calls, tokens=calls * mean, read=calls * read, length=length, serial=serial, longest=longest)


def _instructions(step: Step, flags: Mapping[str, Any], flow: Flow) -> Work:
    count, passing, attempts = flags["count"], flow.values["judged"], flags["max_attempts"]
    if flags["judge_margin"] == -math.inf:
        passing = 0.95
    # After the first draw two at a time (generate.RETRIES), of which one may not be needed.
    again, kept, _ = tries(1 - (1 - passing) ** 2, 1, max(1, (attempts - 1) // 2))
    draws = count * (1 + (1 - passing) * 2 * again) if attempts > 1 else count
    tokens = min(flow.values["instruction"], flow.limit(flags, INSTRUCTION_LIMIT))
    length = CHAT + SELF_INSTRUCT + 3 * tokens
    # The last one is found after as many turns as halve the rest each time.
    turns = 1 + min(attempts / 2, math.log(max(2, count)) / -math.log(max(1e-9, (1 - passing) ** 2)))
    records = count * (kept if attempts > 1 else passing)
    read = length - tokens + JUDGE + tokens  # what it continues, and the judge's question, once for yes and no
    sampled = sampling(draws, tokens, read, length, turns * 2 * tokens, 2 * length)
    return replace(sampled, records=records, answer=tokens)


def _responses(step: Step, flags: Mapping[str, Any], flow: Flow) -> Work:
    median, limit, asked = flow.habit(step), flow.limit(flags), flow.read_from(flags)
    wanted = asked.records * flags["samples"]
    draws, kept, _ = tries(_below(median, limit) * flow.values["filters"], 1, flags["max_attempts"], ALIKE)
    records, answer = _after_bias(wanted * kept, of_the_ended(median, limit), flags)
    calls, prompt = wanted * draws, CHAT + flow.values["instruction"]
    most, mean = longest(median, limit, calls), written(median, limit)
    chain = most * (1 + math.log(max(1.0, min(flags["max_attempts"], wanted)))) if flags["max_attempts"] > 1 else most
    sampled = sampling(calls, mean, prompt, prompt + mean, chain, prompt + most)
    return replace(sampled, records=records, answer=answer, per_instruction=records / max(1e-9, asked.records))


def _extend(step: Step, flags: Mapping[str, Any], flow: Flow) -> Work:
    drafts, median, limit = flow.read_from(flags), flow.habit(step), flow.limit(flags)
    used, kept, rounds = tries(flow.values["extended"], flags["rounds"], flags["max_attempts"])
    jobs = drafts.records * flags["samples"]
    if flags["one_pair"]:  # of each instruction's jobs only those up to the first that is accepted
        each = max(1.0, drafts.per_instruction * flags["samples"])
        jobs *= (1 - (1 - kept) ** each) / max(1e-9, each * kept)
    # A first stage enriches a part of the text, a later one continues what is there: measured, in shares of an answer.
    first, later = written(0.7 * median, limit), written(0.53 * median, limit)
    going_on = sum(flow.values["stage"] ** i for i in range(1, flags["stages"]))  # stages after the first, of a try
    calls = jobs * used * (1 + going_on)
    text = drafts.answer * (flow.values["gain"] * 1.2 ** (max(1.0, rounds) - 1) if kept else 1)
    prompt = CHAT + EXTEND + flow.values["instruction"] + (drafts.answer + text) / 2
    records, answer = _after_bias(jobs * kept, text, flags)
    most = longest(0.7 * median, limit, calls / 2)
    serial = used * (most + going_on * longest(0.53 * median, limit, calls / 2))
    mean = (first + going_on * later) / (1 + going_on)
    sampled = sampling(calls, mean, prompt, prompt + text / 2, serial, prompt + text + most)
    return replace(sampled, records=records, answer=answer, draft=drafts.answer)


def _after_bias(records: float, tokens: float, flags: Mapping[str, Any]) -> tuple[float, float]:
    """(records, tokens of one) after the length bias."""
    if flags["no_length_bias"]:
        return records, tokens
    return max(min(records, 1.0), KEPT_BY_BIAS * records), LONGER_BY_BIAS * tokens


def _constrain(step: Step, flags: Mapping[str, Any], flow: Flow) -> Work:
    answers, attempts = flow.read_from(flags), flags["max_attempts"]
    words = answers.answer / math.exp(SPREAD**2 / 2) / TOKENS_PER_WORD  # the median
    fits = _below(max(1.0, words), flags["demand_max"]) - _below(max(1.0, words), flags["demand_min"])
    records = answers.records * fits
    draws, _, _ = tries(flow.values["woven"], 1, attempts)
    tokens, prompt = min(flow.values["demand"], flow.limit(flags)), CHAT + CONSTRAIN + flow.values["instruction"]
    length, calls = prompt + tokens, records * draws
    sampled = sampling(calls, tokens, prompt, length, draws * 1.5 * tokens, 2 * length)
    return replace(sampled, records=records, answer=answers.answer)


def _train(step: Step, flags: Mapping[str, Any], flow: Flow) -> Work:
    pairs = flow.read_from(flags)
    prompt = CHAT + flow.values["instruction"]
    if flags["role"] == "extender":
        prompt += EXTEND + pairs.draft * (1 if flags["no_line_removal"] else flags["keep_lines"])
    length = prompt + pairs.answer
    seen = pairs.records * flags["epochs"]  # pairs, each as often as it is trained on
    if flags["budget_of"] in flow.made:
        like = flow.made[flags["budget_of"]]
        seen = like.tokens * like.targets / max(1.0, pairs.answer)
    steps = math.ceil(seen / (flags["batch_size"] * flags["accumulate"]))
    most = prompt + pairs.answer * math.exp(2 * SPREAD)  # of a few hundred pairs
    cap = min(flags["max_length"] or flow.context, flow.context)
    learned = pairs.answer / length
    return replace(pairs, calls=steps, tokens=seen * length, length=length, longest=min(most, cap), targets=learned)


def _evaluate(step: Step, flags: Mapping[str, Any], flow: Flow) -> Work:
    queries, limit = _queries(flags), flow.limit(flags)
    median = max(flow.habit(step) * flow.values["asked"], TOKENS_PER_WORD * flags.get("at_least", 0) / 2)
    median = max(median, min(flags.get("min_new_tokens", 0), limit))
    calls, mean = queries * flags["samples"], written(median, limit)
    # Each answer is read once for its perplexity, and three times more for the probes.
    read = QUERY + (QUERY + mean) * (1 if flags["no_probes"] else 4)
    most = longest(median, limit, calls)
    return replace(sampling(calls, mean, read, QUERY + mean, most, QUERY + most), records=calls, answer=mean)


def _queries(flags: Mapping[str, Any]) -> float:
    name, count = flags["benchmark"], float(HUB_QUERIES)
    if name in BENCHMARKS or Path(name).is_file():  # a data set of the hub is not fetched for this
        count = _in_benchmark(name, flags["language"])
    return min(flags["limit"] or count, count)


@cache
def _in_benchmark(name: str, language: str) -> float:
    """Queries; read once for all scenarios and steps."""
    rows = [row for path in find_benchmark(name, language) for row in read_rows(path)]
    return float(len(filter_language(rows, language)))


def _lines(path: str) -> float:
    """Records of a file that no step writes; 0 where there is none yet."""
    return sum(1 for _ in open(path, "rb")) if Path(path).is_file() else 0.0


def measured(work: Work, meta: Mapping[str, Any], step: Step) -> Work:
    """What a finished step did, by its sidecar; what that does not say is as in `work`."""
    stats = meta.get("summary" if step.command[0] == "train.py" else "stats", {})
    records = float(meta.get("accepted", stats.get("pairs", work.records)))
    drawn_ = TOKENS_PER_WORD * meta.get("words", {}).get("sum", 0)
    answer = drawn_ / max(1.0, records) or work.answer
    calls = stats.get("calls", stats.get("attempts", stats.get("steps", work.calls)))
    # An evaluation keeps its tokens with its scores: by its words.
    tokens = stats.get("tokens") or (drawn_ if step.name == "evaluate" else work.tokens)
    return replace(work, calls=calls, tokens=tokens, records=records, answer=answer)


def scenarios(known: Mapping[str, Assumption]) -> list[dict[str, float]]:
    """Nine choices of values, the likely one first: lengths cheap to dear, each with yields cheap to dear.

    Not three: a better yield saves retries and makes more work for the stages after it, so neither end is the cheapest.
    """

    def choice(lengths: int, yields: int) -> dict[str, float]:
        return {name: value.values[lengths if name in LENGTHS else yields] for name, value in known.items()}

    order: Sequence[int] = (1, 0, 2)
    return [choice(i, j) for i in order for j in order]
