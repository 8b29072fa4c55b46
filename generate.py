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
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lengthen import cli
from lengthen.cli import REQUIRED, InputFlags, ModelFlags, OutputFlags, SamplingFlags, at_least, flag
from lengthen.jobs import Job
from lengthen.models.chat import fill, template_hashes
from lengthen.records import (
    UserError,
    draw_seed,
    filter_language,
    new_record,
    prompt_id,
    read_jsonl,
    read_prompts,
    record_id,
    run_id_of,
)
from lengthen.stage import Stage, length_bias_drops, open_job, open_model, sampling_of
from lengthen.text.demands import make_demand, states_demand
from lengthen.text.filters import clean_answer, strip_chatter
from lengthen.text.selection import NearDuplicates
from lengthen.text.words import count_words, detect_language

if TYPE_CHECKING:
    from lengthen.sampling.request import Sample

MIN_INSTRUCTION_WORDS, MAX_INSTRUCTION_WORDS = 3, 500  # both exclusive, as in the release
INSTRUCTION_TOKENS = 1024  # enough for 500 words; an instruction that does not end would else fill the context
JUDGE_BATCH = 8  # instructions judged at a time, between two steps of the sampler
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
    if finish not in ("eos", "stop"):
        return instruction, finish if finish in ("error", "repetition") else "unfinished"
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


def instructions(stage: Stage, own: InstructionsFlags) -> None:
    # 1) seeds, and one record per wanted instruction
    seeds = filter_language(read_prompts(own.seeds, source="seed"), stage.out.language)
    if not seeds:
        raise UserError(f"no seed is of language {stage.out.language!r}", "--language both, or other --seeds")
    run_id = run_id_of(stage.out.output)
    records, shots = [], []
    for sample, language in enumerate(split_count(own.count, seeds)):
        id_ = record_id("instruction", "", sample, scope=run_id)
        shots.append(draw_shots(id_, language, seeds))
        base = {"id": id_, "language": language, "run_id": run_id, "sample": sample, "source": "self-instruct"}
        records.append(new_record("instruction", **base, example_ids=[s["id"] for s in shots[-1]]))
    settings = {
        **{k: getattr(own, k) for k in ("count", "max_attempts", "judge_margin", "long_words")},
        "templates": template_hashes("instruct", "instruct_prefill", "judge"),
    }
    with open_job("instructions", stage, [*own.seeds, *own.dedup_against], settings) as job:
        stats = {}
        if not job.complete:
            distinct = NearDuplicates()
            for known in [*seeds, *(read_prompts(own.dedup_against) if own.dedup_against else [])]:
                distinct.add(known["prompt"], known["language"])
            stats = write_instructions(stage, own, job, records, shots, distinct)
        summary = job.finish(stage.out.min_yield, **stats)
    cli.emit(summary)


def write_instructions(
    stage: Stage,
    own: InstructionsFlags,
    job: Job,
    records: list[dict],
    shots: list[list[dict]],
    distinct: NearDuplicates,
) -> dict:
    """Fill and store the records; returns the stage's statistics.

    Draws run and finish in any order. Whether one is a near-duplicate depends on those before it, so that is decided
    in the order (attempt, sample), each draw waiting for its turn: nearly the order in which the sampler finishes.
    """
    from lengthen.sampling.request import Request

    # The journal holds every draw: {"id", "attempt", "prompt", "reason"}, and {"id", "attempt", "margin"} once judged.
    entries = [e for e in job.journal if "prompt" in e]
    drawn = {(e["id"], e["attempt"]): (e["prompt"], e["reason"]) for e in entries}
    margins = {(e["id"], e["attempt"]): e["margin"] for e in job.journal if "margin" in e}
    loaded, sampler = open_model(stage, job)
    chat = loaded.chat
    wanted = {r["id"]: (r, pair) for r, pair in zip(records, shots, strict=True)}
    turns = deque((r["id"], 0) for r in records)
    asked, failures = set(drawn), Counter()
    no_judge = own.judge_margin == float("-inf")
    unjudged = [draw for draw, (_, reason) in drawn.items() if not reason and draw not in margins and not no_judge]

    def verdict(draw: tuple[str, int]) -> str | None:
        """A reason, "" = passed (but for near-duplicates), None = not known yet."""
        if draw not in drawn or drawn[draw][1]:
            return drawn[draw][1] if draw in drawn else None
        if no_judge:
            return ""
        return None if draw not in margins else "" if margins[draw] > own.judge_margin else "judge"

    def advance(id_: str) -> None:
        """Ask for the next draws as soon as one is known to have failed: its turn may be far away."""
        attempt = 0
        while verdict((id_, attempt)) and attempt + 1 < own.max_attempts:
            attempt += 1
        if verdict((id_, attempt)) == "":
            return
        for ahead in range(attempt, min(attempt + (RETRIES if attempt else 1), own.max_attempts)):
            if (id_, ahead) not in asked:
                ask(id_, ahead)

    def ask(id_: str, attempt: int) -> None:
        asked.add((id_, attempt))
        record, pair = wanted[id_]
        language = record["language"]
        examples = {f"example_{i}": shot["prompt"] for i, shot in enumerate(pair, start=1)}
        messages = [{"role": "user", "content": fill("instruct", language)}]
        prompt_ids = chat.encode(messages, prefill=fill("instruct_prefill", language, **examples))
        sampling = sampling_of(stage.sampling, INSTRUCTION_TOKENS, stop=item_ends(pair, language))
        sampler.add(Request((id_, attempt), prompt_ids, draw_seed(stage.out.seed, id_, attempt), sampling))

    def judge() -> None:
        """Log-probability of yes minus that of no, for all that wait; a question that does not fit gets a no."""
        pairs, questions = [], []
        waiting = [draw for draw in unjudged if draw[0] not in job.done_ids]
        unjudged.clear()
        for id_, attempt in waiting:
            language = wanted[id_][0]["language"]
            question = fill("judge", language, instruction=drawn[id_, attempt][0], words=str(own.long_words))
            prompt_ids = chat.encode([{"role": "user", "content": question}])
            answers = [chat.encode_text(word) for word in YES_NO[language]]
            if len(prompt_ids) + max(map(len, answers)) > loaded.context:
                note_margin(id_, attempt, -1e9)
                continue
            questions.append((id_, attempt))
            pairs += [(prompt_ids, answer) for answer in answers]
        logprobs = [float(values.sum()) for values in sampler.logprobs(pairs)] if pairs else []
        for draw, yes, no in zip(questions, logprobs[::2], logprobs[1::2], strict=True):
            note_margin(*draw, yes - no)
        for id_, _ in waiting:
            advance(id_)

    def note_margin(id_: str, attempt: int, margin: float) -> None:
        job.note({"id": id_, "attempt": attempt, "margin": margin})
        margins[id_, attempt] = margin

    def take_turns() -> None:
        """Decide every draw whose turn has come; the failed ones get another turn behind all others."""
        while turns and (reason := verdict(turns[0])) is not None:
            id_, attempt = turns.popleft()
            prompt, language = drawn[id_, attempt][0], wanted[id_][0]["language"]
            if not reason and not distinct.add(prompt, language):
                # Not called "near-duplicate": that is the reason of a whole-file decision, which a resume undoes.
                reason = "duplicate"
                drawn[id_, attempt] = prompt, reason
            record = {**wanted[id_][0], "attempt": attempt, "prompt": prompt, "prompt_words": count_words(prompt)}
            if reason:
                failures[reason] += 1
            if reason and attempt + 1 < own.max_attempts:
                turns.append((id_, attempt + 1))
                advance(id_)
            elif id_ not in job.done_ids:  # else: stored before a kill, and decided the same way now
                job.reject(record, reason) if reason else job.accept(record)

    for record in records:
        advance(record["id"])
    with cli.progress("instructions", len(records)) as bar:
        take_turns()
        while turns:
            for sample in sampler.run():
                id_, attempt = sample.request.key
                prompt, reason = examine_instruction(sample.text, sample.finish, wanted[id_][0]["language"])
                entry = {"id": id_, "attempt": attempt, "prompt": prompt, "reason": reason, "tokens": sample.num_tokens}
                entries.append(entry)
                job.note(entry)
                drawn[id_, attempt] = prompt, reason
                if not reason and not no_judge:
                    unjudged.append((id_, attempt))
                advance(id_)
                if len(unjudged) >= JUDGE_BATCH:
                    judge()
                take_turns()
                draws = f"{len(job.records)} accepted, {len(entries)} draws"
                bar.update(len(job.done_ids), f"{draws}, {sampler.progress()}")
                if not turns:
                    break  # what still runs was drawn ahead, and is not needed
            judge()
            take_turns()
    for reason, times in failures.items():
        job.count(reason, times)
    return {"attempts": len(entries), "tokens": sum(e["tokens"] for e in entries)}


# ---------------------------------------------------------------------------------------------------------
# 3, 4: responses


def examine_response(record: dict, sample: "Sample") -> tuple[dict, str]:
    """Return (the fields that a draw fills, reason); reason "" = accepted."""
    text, reason = clean_answer(sample.text, sample.finish, record["language"])
    if sample.finish in ("error", "repetition"):
        reason = sample.finish  # more telling than "unfinished"
    fields = {"response": text, "response_words": count_words(text), "response_tokens": sample.num_tokens}
    return {**fields, "finish": sample.finish}, reason


def responses(stage: Stage, inputs: list[str], own: ResponsesFlags) -> None:
    # 1) one record per instruction and sample
    prompts = filter_language(read_prompts(inputs), stage.out.language)
    run_id, records = run_id_of(stage.out.output), []
    for parent in prompts:
        for sample in range(own.samples):
            id_ = record_id("response", parent["id"], sample)
            base = {"id": id_, "parent_id": parent["id"], "language": parent["language"], "run_id": run_id}
            records.append(new_record("response", **base, sample=sample, prompt=parent["prompt"]))
    with open_job("responses", stage, inputs, vars(own)) as job:
        stats = {}
        if not job.complete:
            # 2) draw until the filters pass
            ask = lambda record: (record["prompt"], 0)  # noqa: E731
            stats = draw_each(stage, own.max_attempts, job, records, "answers", ask, examine_response)
            # 3) the shortest go, once all are there
            if not own.no_length_bias:
                job.drop(length_bias_drops(job.records, stage.out.seed))
        summary = job.finish(stage.out.min_yield, **stats)
    cli.emit(summary)


# ---------------------------------------------------------------------------------------------------------
# 5: constrain


def examine_query(record: dict, sample: "Sample") -> tuple[dict, str]:
    """Return ({"query": …}, reason): the rewritten instruction states the demand, in its language, at a sane length."""
    language, prompt = record["language"], record["prompt"]
    query = clean_instruction(strip_chatter(sample.text, language)[0])
    words, prompt_words = count_words(query), count_words(prompt)
    if sample.finish != "eos":
        reason = sample.finish if sample.finish in ("error", "repetition") else "unfinished"
    elif not prompt_words / 2 <= words <= 2 * prompt_words + 30:  # an answer, or a fragment
        reason = "words"
    elif detect_language(query) != language:
        reason = "language"
    else:
        reason = "" if states_demand(query, *demand_of(record), language) else "demand"
    return {"query": query}, reason


def append_demand(record: dict, reason: str) -> tuple[dict, str]:
    """The last resort: the demand in a sentence of its own; not behind a prompt with another demand, which stays."""
    template = APPENDED[record["language"]]
    query = template.format(prompt=record["prompt"].rstrip(), constraint=record["constraint"])
    if not states_demand(query, *demand_of(record), record["language"]):
        return record, reason
    return {**record, "query": query, "attempt": -1}, ""


def demand_of(record: dict) -> tuple[str, int, int]:
    return record["type"], record["min_words"], record["max_words"]


def read_answers(paths: list[str], language: str) -> list[dict]:
    """Answers of several files (responses, extended); a pair of prompt and answer that came before is left out."""
    answers, seen = [], set()
    for path in paths:
        for row in read_jsonl(path, needs=("prompt", "response")):
            row["language"] = row.get("language") or detect_language(row["response"]) or "en"
            row["id"] = row.get("id") or prompt_id(row["language"], row["prompt"] + "\n" + row["response"])
            if (row["prompt"], row["response"]) not in seen:
                seen.add((row["prompt"], row["response"]))
                answers.append(row)
    return filter_language(answers, language)


def constrain(stage: Stage, inputs: list[str], own: ConstrainFlags) -> None:
    # 1) a demand per answer, true of it
    run_id, records, without, same_id = run_id_of(stage.out.output), [], [], Counter()
    for parent in read_answers(inputs, stage.out.language):
        language, words = parent["language"], count_words(parent["response"])
        # Two files may hold the same id with other answers (one prompt file used twice): number them.
        id_ = record_id("constrained", parent["id"], same_id[parent["id"]])
        base = {"id": id_, "parent_id": parent["id"], "language": language, "run_id": run_id}
        kept = {"prompt": parent["prompt"], "response": parent["response"], "response_words": words}
        record = new_record("constrained", **base, **kept, sample=same_id[parent["id"]])
        record["response_tokens"] = parent.get("response_tokens", -1)
        record["origin"] = "extended" if "initial" in parent else "response"
        same_id[parent["id"]] += 1
        bounds = {"low": own.demand_min, "high": own.demand_max, "steps": own.demand_steps}
        demand = make_demand(words, language, random.Random(draw_seed(stage.out.seed, id_, 0)), **bounds)
        if demand is None:
            without.append(record)
        else:
            names = ("constraint", "type", "min_words", "max_words")
            records.append({**record, **dict(zip(names, demand, strict=True))})
    settings = {
        **vars(own),
        "templates": template_hashes("constrain"),
    }
    with open_job("constrain", stage, inputs, settings) as job:
        stats = {}
        if not job.complete:
            for record in without:
                if record["id"] not in job.done_ids:
                    inside = own.demand_min <= record["response_words"] < own.demand_max
                    job.reject(record, "no-demand" if inside else "outside-demand")

            # 2) woven in by the model, else appended
            def ask(record: dict) -> tuple[str, int]:
                fields = {"instruction": record["prompt"], "constraint": record["constraint"]}
                limit = 3 * count_words(record["prompt"]) + 64  # tokens: a rewritten instruction, not an answer
                return fill("constrain", record["language"], **fields), limit

            stats = draw_each(stage, own.max_attempts, job, records, "demands", ask, examine_query, append_demand)
            stats["appended"] = sum(r["attempt"] == -1 for r in job.records)
        summary = job.finish(stage.out.min_yield, **stats)
    cli.emit(summary)


# ---------------------------------------------------------------------------------------------------------
# What responses and constrain share: draw, examine, draw again


def draw_each(
    stage: Stage,
    max_attempts: int,
    job: Job,
    records: list[dict],
    what: str,
    ask: Callable[[dict], tuple[str, int]],
    examine: Callable[[dict, "Sample"], tuple[dict, str]],
    give_up: Callable[[dict, str], tuple[dict, str]] = lambda record, reason: (record, reason),
) -> dict:
    """Sample every record that is not done until `examine` passes it; returns the stage's statistics.

    ask(record) -> (the user's turn, most tokens or 0); examine(record, sample) -> (fields, reason);
    give_up(record, reason) -> (record, reason), asked after the last attempt: reason "" accepts it after all.
    """
    # Draws of an earlier process are in the journal: failed ones are neither made nor counted again, except the last
    # one of a record (a kill may have come between its note and the record), whose text is needed.
    notes = {(n["id"], n["attempt"]): n for n in job.journal}
    failed = Counter(n["id"] for n in notes.values() if n["reason"])
    attempts = {r["id"]: min(failed[r["id"]], max_attempts - 1) for r in records}
    todo = {r["id"]: r for r in records if r["id"] not in job.done_ids}
    if todo:
        from lengthen.sampling.request import Request

        loaded, sampler = open_model(stage, job)

        def add(id_: str) -> None:
            content, limit = ask(todo[id_])
            prompt_ids = loaded.chat.encode([{"role": "user", "content": content}])
            seed = draw_seed(stage.out.seed, id_, attempts[id_])
            sampler.add(Request(id_, prompt_ids, seed, sampling_of(stage.sampling, limit)))

        for id_ in todo:
            add(id_)
        with cli.progress(what, len(todo)) as bar:
            before = len(job.done_ids)  # of an earlier process, or rejected before any draw
            for sample in sampler.run():
                id_ = sample.request.key
                attempt = attempts[id_]
                fields, reason = examine(todo[id_], sample)
                record = {**todo[id_], **fields, "attempt": attempt}
                note = {"id": id_, "attempt": attempt, "reason": reason, "tokens": sample.num_tokens}
                notes[id_, attempt] = note
                job.note(note)
                if reason:
                    if sample.finish == "error":  # it would fail again: a prompt that does not fit, say
                        cli.say(f"  {id_}: {sample.error}")
                    elif attempt + 1 < max_attempts:
                        attempts[id_] += 1
                        add(id_)
                        continue
                    record, reason = give_up(record, reason)
                job.reject(record, reason) if reason else job.accept(record)
                bar.update(len(job.done_ids) - before, f"{len(job.records)} accepted, {sampler.progress()}")
    for reason, times in Counter(n["reason"] for n in notes.values() if n["reason"]).items():
        job.count(reason, times)
    return {"attempts": len(notes), "tokens": sum(n["tokens"] for n in notes.values())}


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
