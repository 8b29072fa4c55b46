"""Judges: local models or servers that are asked for their opinion of answers, and the file of what they say.

    1. a question (questions.py): the template prompts/*/quality.md or compare.md, with the texts between marks that
       occur in none of them
    2. the judge replies with JSON, greedily; a reply that is not in the required form is asked for again with another
       seed at RETRY_TEMPERATURE, --judge-attempts times in all; then the verdict is given up and counted
    3. judgements.jsonl (records "judgement" or "preference") gets one line per verdict as it comes, and
       judgements.rejected.jsonl those given up, with the reason. Started again, only what is missing is asked for; if
       nothing is, no model is loaded and no server is asked. A judge added later is asked for its own opinions only.

A local judge's reply is begun for it ('{"relevance":'), which keeps small models to the form. quality.py and
preferences.py say what is asked, and what the verdicts amount to.
"""

import gc
import json
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from lengthen import cli
from lengthen.cli import at_least, flag
from lengthen.endpoint import AllDown, key_from
from lengthen.evaluation.questions import SHORTEST, JudgeReply, JudgeRequest, Question, cut_middle, read_verdict
from lengthen.evaluation.served import KEY_NAMES, ServedJudge, read_address
from lengthen.jobs import Job
from lengthen.models.chat import template_hashes
from lengthen.records import LowYield, UserError, draw_seed, fingerprint, new_record, record_id, run_id_of
from lengthen.stage import Stage, open_writer
from lengthen.tasks import Draw, Engine, Entry, Redraw, run_tasks

RECORDS = {"quality": "judgement", "compare": "preference"}
PREFILL = {"quality": '{"relevance":', "compare": '{"winner":'}  # no trailing space: it belongs to the next token
RETRY_TEMPERATURE = 0.7  # a greedy retry would write the same text again
LOCAL_TOKENS = 128  # of a local judge's reply; the seven scores take about 60
MARGIN_TOKENS = 32  # texts tokenized one by one may have a few tokens more or fewer than the whole prompt
LONGEST_REPLY = 20_000  # characters; of a longer reply only the end is kept
UNFINISHED = "replies were cut by the token limit, or had not ended their thought"
MORE_TOKENS = "a larger --judge-tokens"
AGAIN = "run the same command again: it asks only for what is missing"


@dataclass(frozen=True)
class JudgeFlags:
    judge: list[str] = flag(
        [],
        "who judges: models as in --model, or addresses of OpenAI-compatible servers, http://HOST:PORT/v1 or "
        "http://HOST:PORT/v1=MODEL; a server's key: LENGTHEN_JUDGE_KEY, else OPENAI_API_KEY, of the environment",
        metavar="JUDGE",
    )
    judge_attempts: int = flag(3, "replies per verdict before it is given up", at_least(1))
    judge_tokens: int = flag(
        2048, "maximum tokens of a server's reply; models that think first need thousands", at_least(1)
    )
    judge_connections: int = flag(4, "requests at a time, per server", at_least(1))
    judge_timeout: float = flag(300.0, "seconds of silence before a server is asked again", at_least(0.01, float))

    def check(self) -> None:
        """Mistakes in --judge, found before hours of sampling."""
        if len(set(self.judge)) < len(self.judge):
            raise UserError("--judge names the same judge twice", "one judge, or two different ones")
        for name in filter(is_address, self.judge):
            read_address(name)
            key_from(*KEY_NAMES)


# ---------------------------------------------------------------------------------------------------------
# Judges


class Judge(Engine, Protocol):
    """Takes JudgeRequests, gives JudgeReplies."""

    model: str  # what answers: a fingerprint of the weights, or a server's name for its model

    def close(self) -> None: ...


class LocalJudge:
    """A model as --model takes it, in our sampler. Texts too long for its context are cut in their middle."""

    def __init__(self, name: str, stage: Stage, job: Job):
        gc.collect()  # the evaluated model is no longer needed, but may be kept alive by a reference cycle
        greedy = replace(stage.sampling, temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0, endpoint=[])
        sampling = replace(greedy, max_new_tokens=LOCAL_TOKENS)
        model = replace(stage.model, model=name, adapter="")
        self.model = fingerprint(name)
        self.writer = open_writer(Stage(stage.out, model, sampling), job)
        self.asked: dict[object, tuple[JudgeRequest, int]] = {}  # key -> (request, characters cut)

    def add(self, request: JudgeRequest) -> None:
        question = request.question
        prompt, cut = question.prompt(self._limit(question))
        own = self.writer.request(
            *request.key, prompt, PREFILL[question.template], stop=("}",)
        )  # the JSON object's end
        self.asked[request.key] = request, cut
        self.writer.add(replace(own, sampling=replace(own.sampling, temperature=request.temperature)))

    def run(self) -> Iterator[JudgeReply]:
        for sample in self.writer.run():
            request, cut = self.asked[sample.request.key]
            text = PREFILL[request.question.template] + sample.text + "}" * (sample.finish == "stop")
            yield JudgeReply(request, text, cut, error=sample.error, num_tokens=sample.num_tokens)

    def progress(self) -> object:
        return self.writer.progress()

    def close(self) -> None:
        import torch

        self.writer.sampler.close()
        del self.writer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _limit(self, question: Question) -> int:
        """Characters of each text that fit. Each text is counted alone, so both orders of a pair are cut alike."""
        whole = (question.query, *question.answers)
        bare = Question("", question.template, question.language, "", ("",) * len(question.answers)).prompt(SHORTEST)[0]
        messages = [{"role": "user", "content": bare}]
        used = len(self.writer.chat.encode(messages, PREFILL[question.template])) + LOCAL_TOKENS + MARGIN_TOKENS
        room, limit = self.writer.sampler.context - used, question.longest()
        while limit > SHORTEST:
            needed = sum(len(self.writer.chat.encode_text(cut_middle(text, limit))) for text in whole)
            if needed <= room:
                break
            limit = max(SHORTEST, min(limit - 1, int(limit * max(room, 0) / needed)))
        return limit


def is_address(name: str) -> bool:
    return re.match(r"https?:", name) is not None


def open_judge(name: str, judges: JudgeFlags, stage: Stage, job: Job) -> Judge:
    if not is_address(name):
        return LocalJudge(name, stage, job)
    try:
        judge = ServedJudge(
            name,
            connections=judges.judge_connections,
            silence=judges.judge_timeout,
            reply_tokens=judges.judge_tokens,
        )
    except AllDown as error:
        raise LowYield(f"the judge does not answer: {error.message}", AGAIN) from None
    url = judge.url
    before = {r["model"] for r in (*job.records, *job.rejected) if r["judge"] == name} - {judge.model}
    if before:
        hint = f"--judge {url}={judge.model} judges everything again"
        judge.close()
        raise UserError(f"{url} was {', '.join(sorted(before))} so far and is {judge.model} now", hint)
    with_key = "with a key" if judge.with_key else "no key"
    cli.say(f"judge: {judge.model} at {url}, {with_key}, {judges.judge_connections} connections")
    return judge


# ---------------------------------------------------------------------------------------------------------
# Asking


class Judgement(Redraw[Judge, JudgeReply]):
    """A verdict that one judge is asked for until one of its replies can be read."""

    def __init__(self, record: dict, question: Question, seed: int, max_attempts: int):
        super().__init__(record, max_attempts)
        self.question, self.seed = question, seed

    def request(self, draw: Draw, judge: Judge) -> JudgeRequest:
        temperature = RETRY_TEMPERATURE if draw[0] else 0.0
        return JudgeRequest((self.id, draw), self.question, draw_seed(self.seed, self.id, *draw), temperature)

    def examine(self, draw: Draw, reply: JudgeReply, judge: Judge) -> Entry:
        return {"missing": reply.missing} if reply.missing else super().examine(draw, reply, judge)

    def read(self, reply: JudgeReply, judge: Judge) -> tuple[dict, str]:
        verdict, reason = ({}, "context") if reply.error else read_verdict(self.question, reply.text, reply.ended)
        fields = {"model": judge.model, "cut": reply.cut, "reply": reply.text[-LONGEST_REPLY:]}
        return {**fields, **verdict_fields(self.record, verdict)}, reason


def verdict_fields(record: dict, verdict: dict) -> dict:
    """A verdict as the fields of its record; {} where there is none."""
    if "winner" in verdict:
        first, second = record["order"]  # "ab": the judge saw A's answer first
        return {"winner": {"first": first, "second": second, "tie": "tie"}[verdict["winner"]]}
    return {**verdict, "mean": round(statistics.fmean(verdict.values()), 4)} if verdict else {}


def ask_judges(
    folder: Path,
    judges: JudgeFlags,
    stage: Stage,
    items: Sequence[tuple[dict, Question]],
    inputs: Sequence[Path] = (),
) -> list[UserError]:
    """Ask each judge what it has not judged yet. Returns what went wrong, to be raised when all else is done.

    items: the known fields of a record, and the question, whose id here is that of the item.
    """
    path, template, problems = folder / "judgements.jsonl", items[0][1].template, []
    asked = ",".join({question.language for _, question in items})
    settings = {**template_hashes(asked, template), "seed": stage.out.seed, "judge_attempts": judges.judge_attempts}
    job = Job(
        f"judge-{template}",
        path,
        inputs=inputs,
        settings=settings,
        info={"judges": judges.judge},
        overwrite=stage.out.overwrite,
        allow_partial=stage.out.allow_partial,
        min_yield=0,
    )
    try:
        with job:
            for name in judges.judge:
                scope, tasks = fingerprint(name), []  # other weights under the same name are another judge
                for fields, question in items:
                    id_ = record_id(template, question.id, 0, scope)
                    if id_ not in job.done_ids:
                        record = new_record(RECORDS[template], **fields, id=id_, judge=name, run_id=run_id_of(path))
                        tasks.append(Judgement(record, question, stage.out.seed, judges.judge_attempts))
                if tasks:
                    job.reopen()
                    try:
                        ask(name, judges, stage, job, tasks)
                    except UserError as error:
                        problems.append(error)
            if not problems:
                job.finish()
    except UserError as error:
        # --overwrite of `answer` would sample all answers again, too; `judge` has no other --output.
        again = f"the --seed and --judge-attempts of before, or rm {folder}/judgements.*  and judge again"
        hint = again if "--overwrite" in error.hint else error.hint
        problems.append(type(error)(error.message, hint))
    return problems


def ask(name: str, judges: JudgeFlags, stage: Stage, job: Job, tasks: Sequence[Judgement]) -> None:
    """One judge, all its questions. LowYield if some got no reply: those are in no file, so they are asked again."""
    judge = open_judge(name, judges, stage, job)
    try:
        missing = run_tasks(job, tasks, lambda: judge, f"judged by {cli.printable(name)}").missing
    finally:
        judge.close()
    if cut := sum(r["judge"] == name and r["reason"] == "unfinished" for r in job.rejected):
        cli.say(f"{cli.printable(name)}: {cut} verdicts given up, {UNFINISHED}: {cli.spelt(MORE_TOKENS)}")
    if missing:
        why = ", ".join(f"{n} x {what}" for what, n in missing.most_common())
        raise LowYield(f"{name}: {missing.total()} of {len(tasks)} judgements are missing ({why})", AGAIN)


def recorded(folder: Path) -> list[dict]:
    """What judgements.jsonl and its rejected file hold, given up ones first; a torn last line is not there yet."""
    records = []
    for name in ("judgements.rejected.jsonl", "judgements.jsonl"):
        path = folder / name
        lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []
        try:
            records += [json.loads(line) for line in lines]
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}", f"rm {folder}/judgements.*  and judge again") from None
    return records


def no_verdict(name: str, folder: Path, failed: int) -> LowYield:
    """What is wrong with a judge whose every verdict was given up."""
    what, hint = "no reply was valid JSON with the required fields", "try a larger judge"
    if any(r["judge"] == name and r.get("reason") == "unfinished" for r in recorded(folder)):
        what, hint = UNFINISHED, f"judge again with a larger --judge-attempts and {MORE_TOKENS}"
    message = f"{name} gave no usable verdict, {failed} were given up: {what}"
    return LowYield(message, f"see {folder / 'judgements.rejected.jsonl'}, and {hint}")


def raise_worst(problems: Sequence[UserError]) -> None:
    """Raise the worst of what went wrong, after a line for each of the others."""
    if problems:
        first, *others = sorted(problems, key=lambda p: isinstance(p, LowYield))
        for other in others:
            cli.say(f"{other.message}  ({other.hint})")
        raise first
