"""A judge's opinion of answers: seven scores each, or which of two is better; by a local model or over HTTP.

    1. a question: the template prompts/quality or compare, the texts between marks that occur in none of them
    2. the judge replies with JSON, greedily; what is not in form is asked for again with a fresh seed at
       RETRY_TEMPERATURE, --judge-attempts times in all; then it is given up and counted
    3. judgements.jsonl (records "judgement" or "preference"): one line per verdict as it comes; what is given up goes
       to judgements.rejected.jsonl with its reason. Started again it asks for what is missing; where nothing is, no
       model is loaded and no server asked. A judge that is added later is asked for its own opinions only.
    4. means and intervals; of pairs: the share that B wins over both orders, how often a judge agrees with itself when
       the order is turned round, how often two judges agree

A local judge finds its reply begun ('{"relevance":'), which keeps small models in form. Scores are read from what it
writes, not from the log-probabilities of the digits: those always give some number, also where a model has no idea of
the task, and a judge that cannot answer in form is to be seen to fail. ("10" is one token here and two there, too.)
"""

import argparse
import gc
import hashlib
import itertools
import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from rich.table import Table
from rich.text import Text

from lengthen import cli
from lengthen.evaluation.endpoint import SHORTEST, Endpoint, Reply, Unanswered, key_from_environment, read_address
from lengthen.evaluation.intervals import bootstrap
from lengthen.jobs import Job
from lengthen.models.chat import fill, template_hashes
from lengthen.records import (
    LowYield,
    UserError,
    draw_seed,
    fingerprint,
    new_record,
    read_jsonl,
    record_id,
    replace_file,
    run_id_of,
)
from lengthen.stage import Stage, open_model, sampling_of

CRITERIA = ("relevance", "coherence", "accuracy", "consistency", "clarity", "creativity", "engagement")  # method.md, 5
WINNERS = ("first", "second", "tie")
RECORDS = {"quality": "judgement", "compare": "preference"}
PREFILL = {"quality": '{"relevance":', "compare": '{"winner":'}  # no space behind: it belongs to the next token
RETRY_TEMPERATURE = 0.7  # greedy would write the same again
LOCAL_TOKENS = 128  # of a local judge's reply; the seven scores take about 60
MARGIN_TOKENS = 32  # pieces of a prompt counted apart may have a few more or fewer tokens than the whole
LONGEST_REPLY = 20_000  # characters; of a longer one the end is read and kept
AGAIN = "run the same command again: it asks only for what is missing"


# ---------------------------------------------------------------------------------------------------------
# Questions


def hash_of(*texts: str) -> str:
    """16 hex digits: the same answer under the same query."""
    return hashlib.sha256("\x1f".join(texts).encode("utf-8", "replace")).hexdigest()[:16]


def cut_middle(text: str, limit: int) -> str:
    """At most `limit` characters of the text, its beginning and its end, and a line that says so."""
    if len(text) <= limit:
        return text
    head = limit // 2
    note = f"[… {len(text) - limit} characters are left out here, for the judge only …]"
    return f"{text[:head]}\n{note}\n{text[len(text) - limit + head :]}"


@dataclass(frozen=True)
class Question:
    """One thing to be judged: one answer, or two in the order in which the judge sees them."""

    id: str
    kind: str  # "quality" or "compare"
    language: str
    query: str
    answers: tuple[str, ...]

    @cached_property
    def mark(self) -> str:
        """What the fence is made of: in none of the texts, cut or whole, and the same in either order of them."""
        texts = sorted((self.query, *self.answers))
        marks = (f"#{hash_of(str(number), *texts)[:8]}" for number in itertools.count())
        return next(mark for mark in marks if not any(mark in text for text in texts))

    def longest(self) -> int:
        return max(map(len, (self.query, *self.answers)))

    def prompt(self, limit: int) -> tuple[str, int]:
        """The prompt with each text cut to `limit` characters, and how many characters were left out."""
        whole = (self.query, *self.answers)
        texts = [cut_middle(text, limit) for text in whole]
        names = ("query", "answer") if self.kind == "quality" else ("query", "first", "second")
        fields = dict(zip(names, texts, strict=True))
        cut = sum(max(0, len(text) - limit) for text in whole)
        return fill(self.kind, self.language, mark=self.mark, **fields), cut


# ---------------------------------------------------------------------------------------------------------
# Verdicts


def objects(text: str) -> Iterator[dict]:
    """The JSON objects in a text, wherever they stand: behind prose, in code fences, inside one another."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            found, _ = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        yield found


def read_verdict(question: Question, text: str) -> tuple[dict, str]:
    """(the verdict, "") or ({}, why there is none).

    Two different verdicts are none: one of them may be quoted from the answer. Nor is any in a reply that repeats the
    fence: a weak judge copies the prompt, and with it what the answer has to say about itself.
    """
    text = text.rpartition("</think>")[2]  # what a reasoning model weighs before is no verdict
    if question.mark in text:
        return {}, "echo"
    read = read_scores if question.kind == "quality" else read_winner
    found = list(objects(text))
    verdicts = [verdict for verdict in map(read, found) if verdict]
    if not verdicts:
        return {}, "out-of-form" if found else "no-json"
    return (verdicts[0], "") if all(v == verdicts[0] for v in verdicts) else ({}, "several-verdicts")


def read_scores(found: dict) -> dict:
    """The seven scores where all are there and whole numbers from 1 to 10, else {}. (True is no number.)"""
    scores = {name: found.get(name) for name in CRITERIA}
    return scores if all(type(v) is int and 1 <= v <= 10 for v in scores.values()) else {}


def read_winner(found: dict) -> dict:
    return {"winner": found["winner"]} if found.get("winner") in WINNERS else {}


# ---------------------------------------------------------------------------------------------------------
# Judges: add(question, seed, temperature), run() -> replies, close(); `model` is what answers


class LocalJudge:
    """A model as --model takes it, in our sampler. Texts too long for its context are cut in their middle."""

    def __init__(self, name: str, args: argparse.Namespace, job: Job):
        gc.collect()  # the evaluated model is no longer needed, but may hang together in a circle
        model = replace(cli.take(args, cli.ModelFlags), model=name, adapter="")
        self.sampling = replace(
            cli.take(args, cli.SamplingFlags),
            temperature=0.0,
            top_p=1.0,
            top_k=0,
            repetition_penalty=1.0,
            max_new_tokens=LOCAL_TOKENS,
        )
        self.model = fingerprint(name)
        self.loaded, self.sampler = open_model(Stage(cli.take(args, cli.OutputFlags), model, self.sampling), job)
        self.asked: dict[str, tuple[str, int]] = {}  # id -> (how the reply begins, characters cut)

    def add(self, question: Question, seed: int, temperature: float) -> None:
        from lengthen.sampling.request import Request

        prompt, cut = question.prompt(self._limit(question))
        prefill = PREFILL[question.kind]
        ids = self.loaded.chat.encode([{"role": "user", "content": prompt}], prefill)
        sampling = sampling_of(replace(self.sampling, temperature=temperature), stop=("}",))  # the JSON object's end
        self.asked[question.id] = prefill, cut
        self.sampler.add(Request(question.id, ids, seed, sampling))

    def run(self) -> Iterator[Reply]:
        for sample in self.sampler.run():
            prefill, cut = self.asked[sample.request.key]
            text = prefill + sample.text + "}" * (sample.finish == "stop")
            yield Reply(sample.request.key, text, cut, unfit=sample.finish == "error")

    def close(self) -> None:
        import torch

        self.sampler.close()
        del self.loaded, self.sampler
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _limit(self, question: Question) -> int:
        """Characters of each text that fit. Counted by pieces, so both orders of a pair are cut alike."""
        whole = (question.query, *question.answers)
        bare = Question("", question.kind, question.language, "", ("",) * len(question.answers)).prompt(SHORTEST)[0]
        messages = [{"role": "user", "content": bare}]
        used = len(self.loaded.chat.encode(messages, PREFILL[question.kind])) + LOCAL_TOKENS + MARGIN_TOKENS
        room, limit = self.sampler.context - used, question.longest()
        while limit > SHORTEST:
            needed = sum(len(self.loaded.chat.encode_text(cut_middle(text, limit))) for text in whole)
            if needed <= room:
                break
            limit = max(SHORTEST, min(limit - 1, int(limit * max(room, 0) / needed)))
        return limit


def is_address(name: str) -> bool:
    return re.match(r"https?:", name) is not None


def open_judge(name: str, args: argparse.Namespace, job: Job) -> LocalJudge | Endpoint:
    if not is_address(name):
        return LocalJudge(name, args, job)
    url, model = read_address(name)
    key = key_from_environment()
    try:
        judge = Endpoint(
            url,
            model,
            key=key,
            connections=args.judge_connections,
            timeout=args.judge_timeout,
            reply_tokens=args.judge_tokens,
        )
    except Unanswered as error:
        raise LowYield(f"{url} does not answer: {error}", AGAIN) from None
    before = {r["model"] for r in (*job.records, *job.rejected) if r["judge"] == name} - {judge.model}
    if before:
        hint = f"--judge {url}={judge.model} judges all anew"
        raise UserError(f"{url} was {', '.join(sorted(before))} so far and is {judge.model} now", hint)
    cli.say(f"judge: {judge.model} at {url}, {'with a key' if key else 'no key'}, {args.judge_connections} connections")
    return judge


# ---------------------------------------------------------------------------------------------------------
# Asking


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--judge and what belongs to it."""
    group = parser.add_argument_group("judge")
    group.add_argument(
        "--judge",
        nargs="+",
        default=[],
        metavar="JUDGE",
        help="score quality, or with --compare prefer one of two: a model as in --model, or the address of an "
        "OpenAI-compatible server, http://HOST:PORT/v1 or http://HOST:PORT/v1=MODEL; its key: LENGTHEN_JUDGE_KEY, else "
        "OPENAI_API_KEY, of the environment",
    )
    group.add_argument(
        "--judge-attempts", type=cli.at_least(1), default=3, help="replies asked for until one is in form, per verdict"
    )
    group.add_argument(
        "--judge-tokens",
        type=cli.at_least(1),
        default=2048,
        help="most tokens in a server's reply: models that think first need thousands, others stop by themselves",
    )
    group.add_argument("--judge-connections", type=cli.at_least(1), default=4, help="requests at a time, per server")
    group.add_argument(
        "--judge-timeout", type=cli.at_least(0.01, float), default=300.0, help="seconds that a server has for a reply"
    )


def check_flags(args: argparse.Namespace) -> None:
    """Mistakes in --judge are found before hours of sampling."""
    if len(set(args.judge)) < len(args.judge):
        raise UserError("--judge names the same judge twice", "one judge, or two that differ")
    for name in filter(is_address, args.judge):
        read_address(name)
        key_from_environment()
    if args.judge and args.compare and (len(args.compare) != 2 or not args.output):
        hint = "python evaluate.py --compare RUN_A RUN_B --judge JUDGE --output FOLDER"
        raise UserError("--compare with --judge takes two runs and an --output", hint)


def ask_judges(
    folder: Path, args: argparse.Namespace, items: Sequence[tuple[dict, Question]], inputs: Sequence[Path] = ()
) -> list[UserError]:
    """Put to each judge what it has not judged yet. Returns what went wrong, to be told when all else is done.

    items: the fields of a record that are known, and the question, whose id here is that of the item.
    """
    path, kind, problems = folder / "judgements.jsonl", items[0][1].kind, []
    settings = {**template_hashes(kind), "seed": args.seed, "judge_attempts": args.judge_attempts}
    about = {"inputs": inputs, "settings": settings, "info": {"judges": args.judge}}
    about |= {"overwrite": args.overwrite, "allow_partial": args.allow_partial}
    try:
        with Job(f"judge-{kind}", path, **about) as job:
            for name in args.judge:
                scope, todo = fingerprint(name), {}  # other weights under the same name are another judge
                for fields, question in items:
                    id_ = record_id(kind, question.id, 0, scope)
                    if id_ not in job.done_ids:
                        record = new_record(RECORDS[kind], **fields, id=id_, judge=name, run_id=run_id_of(path))
                        todo[id_] = record, replace(question, id=id_)
                if todo:
                    job.reopen()
                    try:
                        ask(name, job, todo, args)
                    except UserError as error:
                        problems.append(error)
            if not problems:
                job.finish(min_yield=0)
    except UserError as error:  # the folder is another command's: its --overwrite would answer everything anew, too
        hint = error.hint.replace("--overwrite starts it afresh", f"rm {folder}/judgements.*  starts it afresh")
        problems.append(type(error)(error.message, hint))
    return problems


def ask(name: str, job: Job, todo: dict[str, tuple[dict, Question]], args: argparse.Namespace) -> None:
    """One judge, every question of `todo` until a verdict is read or the attempts are used up.

    LowYield where some have no reply: those are in no file, so that they are asked for again.
    """
    judge = open_judge(name, args, job)
    attempts, missing, done = dict.fromkeys(todo, 0), Counter(), 0

    def add(id_: str) -> None:
        temperature = RETRY_TEMPERATURE if attempts[id_] else 0.0
        judge.add(todo[id_][1], draw_seed(args.seed, id_, attempts[id_]), temperature)

    try:
        for id_ in todo:
            add(id_)
        with cli.progress(f"judged by {cli.printable(name)}", len(todo)) as bar:
            for reply in judge.run():
                if reply.missing:
                    missing[reply.missing] += 1
                    continue
                record, question = todo[reply.id]
                text, attempt = reply.text[-LONGEST_REPLY:], attempts[reply.id]
                record |= {"attempt": attempt, "model": judge.model, "cut": reply.cut, "reply": text}
                verdict, reason = ({}, "context") if reply.unfit else read_verdict(question, text)
                if verdict:
                    job.accept({**record, **verdict_fields(record, verdict)})
                else:
                    job.count(reason)
                    if attempt + 1 < args.judge_attempts and not reply.unfit:
                        attempts[reply.id] += 1
                        add(reply.id)
                        continue
                    job.reject(record, reason)
                done += 1
                bar.update(done)
    finally:
        judge.close()
    if missing:
        why = ", ".join(f"{n} x {what}" for what, n in missing.most_common())
        raise LowYield(f"{name}: {missing.total()} of {len(todo)} judgements are missing ({why})", AGAIN)


def verdict_fields(record: dict, verdict: dict) -> dict:
    """A verdict as the fields of its record."""
    if "winner" not in verdict:
        return {**verdict, "mean": round(statistics.fmean(verdict.values()), 4)}
    first, second = record["order"]
    return {"winner": {"first": first, "second": second, "tie": "tie"}[verdict["winner"]]}


def recorded(folder: Path) -> list[dict]:
    """What judgements.jsonl and its rejected file hold, given up ones first; a torn last line is not there yet."""
    found = []
    for name in ("judgements.rejected.jsonl", "judgements.jsonl"):
        path = folder / name
        lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []
        try:
            found += [json.loads(line) for line in lines]
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}", f"rm {folder}/judgements.*  and judge again") from None
    return found


# ---------------------------------------------------------------------------------------------------------
# Scores of the answers of a run


def judge_answers(folder: Path, outputs: Sequence[dict], args: argparse.Namespace) -> list[UserError]:
    """Seven scores from each judge for each "output" record; what went wrong is returned."""
    items = []
    for row in outputs:
        fields = {k: row[k] for k in ("language", "sample")} | {"parent_id": row["id"]}
        fields["answer_hash"] = hash_of(row["query"], row["response"])
        key = f"{row['id']} {fields['answer_hash']}"
        items.append((fields, Question(key, "quality", row["language"], row["query"], (row["response"],))))
    problems = ask_judges(folder, args, items)
    for name, found in quality(folder, outputs, args.judge).items():
        if name in args.judge and not found["judged"] and not found["missing"]:
            problems.append(no_verdict(name, folder, found["failed"]))
    return problems


def no_verdict(name: str, folder: Path, failed: int) -> LowYield:
    where = folder / "judgements.rejected.jsonl"
    return LowYield(
        f"{name} gave no usable verdict: {failed} of {failed} replies are not in form", f"see {where}; a larger judge"
    )


def quality(folder: Path, outputs: Sequence[dict], asked: Sequence[str] = ()) -> dict[str, dict]:
    """{judge: means of the seven scores, their mean and its interval, counts} of what judgements.jsonl says on these
    answers, whoever asked for it and when; `asked`: judges to be listed though they may have said nothing."""
    hashes = {row["id"]: hash_of(row["query"], row["response"]) for row in outputs}
    latest: dict[str, dict[str, dict]] = {name: {} for name in asked}
    for record in recorded(folder):
        if hashes.get(record["parent_id"]) == record["answer_hash"]:
            latest.setdefault(record["judge"], {})[record["parent_id"]] = record
    scores = {}
    for name, found in latest.items():
        good = {id_: r for id_, r in found.items() if "reason" not in r}
        groups = grouped((row["parent_id"], good[row["id"]]["mean"]) for row in outputs if row["id"] in good)
        scores[name] = {
            **{key: mean([r[key] for r in good.values()]) for key in (*CRITERIA, "mean")},
            "interval": interval(groups),
            "judged": len(good),
            "failed": len(found) - len(good),  # given up: no reply was in form
            "missing": len(outputs) - len(found),  # no reply was to be had yet
            "cut": sum(r["cut"] > 0 for r in good.values()),
        }
    return scores


def mean(values: Sequence[float]) -> float | None:
    return round(statistics.fmean(values), 4) if values else None


def grouped(pairs: Iterable[tuple[Hashable, float]]) -> list[list[float]]:
    """The values of each key together: the answers to one query are resampled as one."""
    groups = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return list(groups.values())


def interval(groups: list[list[float]]) -> list[float] | None:
    """The 95 % bootstrap interval of the mean, over queries."""
    found = bootstrap(groups, statistics.fmean) if groups else None
    return found and [round(x, 4) for x in found]


def show_quality(scores: dict[str, dict]) -> None:
    """One column per judge, on stderr."""
    if not scores:
        return
    table = Table(title="Quality, 1 to 10 (length ignored)")
    table.add_column("criterion")
    for name in scores:
        table.add_column(Text(cli.printable(name)), justify="right", overflow="fold")  # brackets are no markup
    rows = [(key, key, "{:.2f}") for key in (*CRITERIA, "mean")] + [("interval", "  95 % interval", "{:.2f}")]
    for key, name, form in rows + [(key, key, "{:,}") for key in ("judged", "failed", "missing", "cut")]:
        table.add_row(name, *(told(one[key], form) for one in scores.values()))
    cli.console.print(table)


def told(value: float | Sequence[float] | None, form: str) -> str:
    """A number, an interval or nothing, for a table."""
    if value is None:
        return "-"
    return " to ".join(form.format(end) for end in value) if isinstance(value, list) else form.format(value)


# ---------------------------------------------------------------------------------------------------------
# Which of two runs is better


def pairs_of(a: Sequence[dict], b: Sequence[dict]) -> list[tuple[dict, dict]]:
    """Answers of both runs to the same query and sample; each answer is in one pair at most."""
    partners = defaultdict(list)
    for row in sorted(b, key=lambda r: r["parent_id"], reverse=True):
        partners[row["language"], row["query"], row["sample"]].append(row)
    pairs = []
    for row in sorted(a, key=lambda r: (r["parent_id"], r["sample"])):
        if others := partners[row["language"], row["query"], row["sample"]]:
            pairs.append((row, others.pop()))
    return pairs


def compare_runs(args: argparse.Namespace) -> tuple[dict, list[UserError]]:
    """Let the judges prefer one of two answers, in both orders; (what comparison.json holds, what went wrong)."""
    folder, files = Path(args.output), [Path(run) / "outputs.jsonl" for run in args.compare]
    if (folder / "outputs.jsonl").exists():
        raise UserError(f"{folder} is the folder of a run", "--output ANOTHER_FOLDER")
    a, b = (read_jsonl(file, needs=("id", "parent_id", "query", "language")) for file in files)
    pairs = pairs_of(a, b)
    if not pairs:
        raise UserError(f"{files[0]} and {files[1]} hold no answers to the same query", "two runs on one --benchmark")
    items = []
    for one, other in pairs:
        texts = {"a": one["response"], "b": other["response"]}
        fields = {"parent_id": one["id"], "other_id": other["id"], "language": one["language"], "sample": one["sample"]}
        fields["answer_hash"] = hash_of(one["query"], *texts.values())
        for order in ("ab", "ba"):
            answers = tuple(texts[run] for run in order)
            key = f"{one['id']} {fields['answer_hash']} {order}"
            question = Question(key, "compare", one["language"], one["query"], answers)
            items.append(({**fields, "order": order}, question))
    problems = ask_judges(folder, args, items, inputs=files)
    result = {
        "run_a": args.compare[0],
        "run_b": args.compare[1],
        "pairs": len(pairs),
        "unpaired": [len(a) - len(pairs), len(b) - len(pairs)],
        **preferences(recorded(folder), pairs, args.judge),
    }
    for name, found in result["judges"].items():
        if name in args.judge and not found["verdicts"] and not found["missing"]:
            problems.append(no_verdict(name, folder, found["failed"]))
    if folder.exists():  # it does not where an input was refused
        replace_file(folder / "comparison.json", json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    show_preferences(result)
    return result, problems


POINTS = {"a": 0.0, "tie": 0.5, "b": 1.0}  # of a verdict, for B


def preferences(records: Sequence[dict], pairs: Sequence[tuple[dict, dict]], asked: Sequence[str] = ()) -> dict:
    """{"judges": {judge: what it prefers and how steadily}, "between_judges": [how far two of them agree]}.

    Only pairs judged in both orders count: a judge who always takes the first answer then gives each run one half.
    """
    by_judge: dict[str, dict] = {name: {} for name in asked}
    ids = {one["id"] for one, _ in pairs}
    for r in records:
        if r["parent_id"] in ids:
            by_judge.setdefault(r["judge"], {})[r["parent_id"], r["order"]] = r
    judges, outcomes = {}, {}
    for name, found in by_judge.items():
        good = {key: r for key, r in found.items() if "reason" not in r}
        both = [
            (one, good[one["id"], "ab"]["winner"], good[one["id"], "ba"]["winner"])
            for one, _ in pairs
            if {(one["id"], "ab"), (one["id"], "ba")} <= good.keys()
        ]
        points = {one["id"]: (POINTS[ab] + POINTS[ba]) / 2 for one, ab, ba in both}
        outcomes[name] = {id_: "b" if p > 0.5 else "a" if p < 0.5 else "tie" for id_, p in points.items()}
        decided = [r["order"][0] == r["winner"] for r in good.values() if r["winner"] != "tie"]
        turned = [ab for _, ab, _ in both], [ba for _, _, ba in both]
        counts = Counter(outcomes[name].values())
        judges[name] = {
            "judged": len(both),  # pairs, in both orders
            "win_rate": mean(list(points.values())),  # of B; a tie is one half
            "interval": interval(grouped(((one["language"], one["query"]), points[one["id"]]) for one, _, _ in both)),
            "wins_a": counts["a"],
            "wins_b": counts["b"],
            "ties": counts["tie"],  # also where the two orders contradict each other
            "order_agreement": agreement(*turned),
            "order_kappa": kappa(*turned),
            "first_share": mean([float(x) for x in decided]),  # verdicts for the answer that stood first; 0.5 = no bias
            "verdicts": len(good),
            "failed": len(found) - len(good),
            "missing": 2 * len(pairs) - len(found),
            "cut": sum(r["cut"] > 0 for r in good.values()),
        }
    between = []
    for x, y in itertools.combinations(outcomes, 2):
        common = [id_ for id_ in outcomes[x] if id_ in outcomes[y]]
        said = [outcomes[x][id_] for id_ in common], [outcomes[y][id_] for id_ in common]
        between.append({"judges": [x, y], "pairs": len(common), "agreement": agreement(*said), "kappa": kappa(*said)})
    return {"judges": judges, "between_judges": between}


def agreement(x: Sequence[str], y: Sequence[str]) -> float | None:
    """The share of places in which both say the same."""
    return mean([float(a == b) for a, b in zip(x, y, strict=True)])


def kappa(x: Sequence[str], y: Sequence[str]) -> float | None:
    """Cohen's kappa: agreement beyond that of two who say each thing as often, independently. None where both always
    say one and the same: there is nothing beyond."""
    if not x:
        return None
    one, other, n = Counter(x), Counter(y), len(x)
    by_chance = sum(one[c] * other[c] for c in one) / n**2
    observed = sum(a == b for a, b in zip(x, y, strict=True)) / n
    return None if by_chance == 1 else round((observed - by_chance) / (1 - by_chance), 4)


def show_preferences(result: dict) -> None:
    """One column per judge, on stderr."""
    table = Table(title=Text(cli.printable(f"B = {result['run_b']} against A = {result['run_a']}")))
    table.add_column("measure")
    for name in result["judges"]:
        table.add_column(Text(cli.printable(name)), justify="right", overflow="fold")  # brackets are no markup
    rows = (
        ("win_rate", "B preferred (tie = one half)", "{:.1%}"),
        ("interval", "  95 % interval", "{:.1%}"),
        ("wins_a", "pairs for A", "{:,}"),
        ("wins_b", "pairs for B", "{:,}"),
        ("ties", "ties", "{:,}"),
        ("order_agreement", "same verdict in both orders", "{:.1%}"),
        ("order_kappa", "  Cohen's kappa", "{:+.2f}"),
        ("first_share", "verdicts for the first answer", "{:.1%}"),
        ("judged", "pairs judged in both orders", "{:,}"),
        ("failed", "verdicts given up", "{:,}"),
        ("missing", "verdicts missing", "{:,}"),
        ("cut", "verdicts on cut texts", "{:,}"),
    )
    for key, name, form in rows:
        table.add_row(name, *(told(one[key], form) for one in result["judges"].values()))
    cli.console.print(table)
    cli.say(f"{result['pairs']} pairs of answers to the same query and sample; without a partner: {result['unpaired']}")
    for pair in result["between_judges"]:
        if pair["agreement"] is not None:
            beyond = "-" if pair["kappa"] is None else f"{pair['kappa']:+.2f}"
            who = " and ".join(pair["judges"])
            cli.say(f"{who} agree on {pair['agreement']:.1%} of {pair['pairs']} pairs, Cohen's kappa {beyond}")


def tell(problems: Sequence[UserError]) -> None:
    """Raise the gravest of what went wrong, behind a line for each other one."""
    if problems:
        first, *others = sorted(problems, key=lambda p: isinstance(p, LowYield))
        for other in others:
            cli.say(f"{other.message}  ({other.hint})")
        raise first
