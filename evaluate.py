"""Evaluate: let a model answer queries that ask for a length, and measure what comes back.

Five commands; without one of these names, `answer` is meant.

answer   1. The queries of a benchmark in LonGen's format: one length demand ("around 3000 words", "小于5000字") each.
         2. The model answers every query --samples times, its prompts rendered as in training.
         3. Probes, with the model that is still loaded: is the beginning of an answer likelier after its own query than
            after another one (is it about its query)? How does the base model's perplexity run along it (does it
            decay)? How likely are the short answers of prompts/*/short_tasks.jsonl (can the model still be brief)?
            On a CPU this takes a third of the sampling's time (SmolLM2: 36 s and 109 s); --no-probes leaves it out.
         4. Scores: each answer's length by LonGen's published formula and word count, and controls beside it:
            - rank correlation of wanted and written lengths: does the model follow, or is it merely long?
            - constant writer: what always writing N words would score on the same queries, for the best N and others
            - share of answers that end by EOS, share that loop and where, distinct-3 and compression of equal prefixes
score    Step 4 for ready-made answers: JSONL with query, response, and the benchmark's fields and finish where known.
judge    Models score relevance, coherence, ... of each answer of a run, length ignored (evaluation/questions.py).
compare  Runs side by side; with --judge, also which of two runs' answers is better, in both orders.
report   A run of run.py as one HTML file.

Beside each number is its 95 % interval over queries (evaluation/intervals.py), in `compare` also that of a difference.

Reads   prompts/*/bench_mini.jsonl ("mini"), any JSONL with language, range, type, constraint, query, or a data set of
        the hub; ready-made answers.
Writes  OUTPUT/outputs.jsonl one record "output" per finished answer: killed and started again, it goes on from there.
        OUTPUT/scores.json   length scores in points of 100, shares in 0..1, losses in nats per token, words by the
                             strict measure (text.words.count_words) unless named longen_words; null = not defined
                             or not measured.
        OUTPUT/length_following.png; OUTPUT/judgements.jsonl, one verdict a line; comparison.json of compare --judge.

Departures from the release (eval/ of QwenLM/Self-Lengthen)
    1. The average length score is never shown alone: a writer who ignores the query and always writes 4,000 words gets
       67.8 of LonGen's 100 points. Rank correlation and constant writer stand beside it.
    2. Answers cut by the token limit or by the loop detector are counted apart: their length is not the model's choice.
    3. Queries that do not state their demand (LonGen has four) are listed, not corrected.
    4. Every way to write a number, every language, one command.

Examples
    python evaluate.py --model smollm2 --benchmark mini --language en --limit 8 --output runs/try/base
    python evaluate.py --model Qwen/Qwen2.5-7B-Instruct --benchmark quanshr/LonGen --output runs/qwen/eval/base
    python evaluate.py score answers.jsonl --output runs/answers --judge smollm2 http://127.0.0.1:8000/v1
    python evaluate.py judge runs/demo/eval/final --judge http://127.0.0.1:8000/v1=NAME
    python evaluate.py compare runs/demo/eval/base runs/demo/eval/final
    python evaluate.py report runs/demo
    python evaluate.py answer --help
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lengthen import cli
from lengthen.cli import ModelFlags, OutputFlags, SamplingFlags, flag
from lengthen.evaluation.benchmark import contradictions, find_benchmark, read_rows, select
from lengthen.evaluation.compare import compare, read_scores
from lengthen.evaluation.growth import query_of
from lengthen.evaluation.judge import JudgeFlags, raise_worst
from lengthen.evaluation.preferences import compare_runs
from lengthen.evaluation.probes import probe
from lengthen.evaluation.quality import judge_answers, quality, show_quality
from lengthen.evaluation.report.figures import length_following
from lengthen.evaluation.report.page import write_report
from lengthen.evaluation.scores import complete, read_outputs, rounded, score, show
from lengthen.jobs import Job, check_inputs
from lengthen.records import UserError, hash_of, record_id, replace_file, run_id_of
from lengthen.sampling.request import Request, Sample
from lengthen.stage import Stage, Writer, open_job, open_writer
from lengthen.tasks import Draw, Redraw, run_tasks
from lengthen.text.demands import length_score
from lengthen.text.languages import language
from lengthen.text.words import count_words, longen_words

# In scores.json, but not in the summary line: what the run was, and lists of single queries.
DETAILS = (
    *("source", "model", "adapter", "sampling", "queries_hash"),
    *("unanswered", "contradicting", "short_losses", "short_tasks"),
)

# ---------------------------------------------------------------------------------------------------------
# Flags that only this stage has


# The other flags of a model that writes are those of every stage (lengthen/cli.py), and those of judges are in
# lengthen/evaluation/judge.py.


@dataclass(frozen=True)
class BenchmarkFlags:
    benchmark: str = flag("mini", "mini, a JSONL file in LonGen's format, or a hub data set id")
    limit: int = flag(0, "only the first N queries; 0 = all", cli.at_least(0))
    samples: int = flag(1, "answers per query", cli.at_least(1))
    no_probes: bool = flag(False, "leave out what the model is asked about its answers afterwards")


@dataclass(frozen=True)
class ControlFlags:
    at_least: int = flag(0, "ask each query for N words or more; 0 = off", cli.at_least(0))
    min_new_tokens: int = flag(0, "ban EOS from the first N tokens; 0 = off", cli.at_least(0))


# ---------------------------------------------------------------------------------------------------------
# 1, 2: answers


class Answer(Redraw[Writer, Sample]):
    """One answer to a query. A single draw: what is cut or loops is a result here, and is counted."""

    def __init__(self, record: dict, controls: ControlFlags):
        super().__init__(record, max_attempts=1)
        self.controls = controls

    def request(self, draw: Draw, writer: Writer) -> Request:
        # The record keeps the benchmark's own query: what is appended is a setting of the run.
        row, words = self.record, self.controls.at_least
        demand = language(row["language"]).demand.at_least.format(words=words) if words else ""
        # Four tokens for three words is near enough to start the longest answers first: started last, they would run
        # alone at the end. A bound of -1 is a missing one, and 0 tokens = not known.
        expected = max(0, row["min_words"], row["max_words"]) * 4 // 3
        banned = self.controls.min_new_tokens
        return writer.request(self.id, draw, row["query"] + demand, min_new_tokens=banned, expected_tokens=expected)

    def read(self, sample: Sample, writer: Writer) -> tuple[dict, str]:
        # The one reason to reject: the prompt does not fit the context. A bad answer is a result, and is scored.
        if sample.error:
            return {}, "context"
        # By another forward pass, at temperature 1 and without top-p: of the model's own distribution, not of the one
        # that was sampled from. The answer's EOS is one of its tokens.
        [logprobs] = writer.logprobs([(sample.request.prompt_ids, sample.token_ids)])  # nats [answer tokens]
        perplexity = math.exp(-logprobs.mean().item()) if len(logprobs) else -1.0  # only a thought: no answer's tokens
        return measured(self.record, sample.text, sample.finish, sample.num_tokens, perplexity), ""


def measured(row: dict, response: str, finish: str, response_tokens: int, perplexity: float = -1.0) -> dict:
    """The fields of a row that its answer fills, with everything that is measured on the answer alone."""
    # LonGen's own word count goes with LonGen's own formula, and with nothing else: it counts punctuation.
    words = longen_words(response)
    demand = row["type"], row["min_words"], row["max_words"]
    return {
        "response": response,
        "response_words": count_words(response),
        "longen_words": words,
        "response_tokens": response_tokens,
        "finish": finish,
        "length_score": round(length_score(words, *demand), 6) if row["constraint"] else -1.0,
        "perplexity": round(perplexity, 4),
    }


def answer(stage: Stage, asked: BenchmarkFlags, controls: ControlFlags, judges: JudgeFlags) -> None:
    # 1) the queries, as records whose answer is still missing
    sources = find_benchmark(asked.benchmark, stage.out.language)
    rows = [row for source in sources for row in read_rows(source)]
    rows = select(rows, stage.out.language, asked.limit, asked.benchmark)
    # 2) the answers and, while the model is loaded, 3) their probes. A finished run loads no model.
    folder = Path(stage.out.output)
    output = str(folder / "outputs.jsonl")
    drawn = {"samples": asked.samples, **vars(controls)}
    writes = replace(stage, out=replace(stage.out, output=output))
    with open_job("evaluate", writes, [*map(str, sources)], {"limit": asked.limit, **drawn}) as job:
        probes: dict[str, Any] = {}
        if not job.complete:
            probes = ask_model(job, rows, writes, asked, controls)
        elif not asked.no_probes and all(r["base_tokens"] < 0 for r in map(complete, job.records)):
            cli.say(cli.spelt("these answers were made without the probes; --overwrite makes them again, with probes"))
        summary = job.finish(**probes)
        # 4) the scores, computed again each time: they cost seconds, and a new measure reaches old runs
        sampling = {**stage.sampling.recipe(), **drawn, "seed": stage.out.seed, "kv_cache": stage.sampling.kv_cache}
        about = {"source": asked.benchmark, "model": stage.model.model, "adapter": stage.model.adapter}
        write_scores(job, rows, {**about, "sampling": sampling}, summary)
    finish(folder, f"{stage.model.model}{' + ' * bool(stage.model.adapter)}{stage.model.adapter}", judges, stage)


def ask_model(job: Job, rows: list[dict], stage: Stage, asked: BenchmarkFlags, controls: ControlFlags) -> dict:
    """Answers and probes, by a model that is gone when this returns: a judge may need its memory."""
    tasks = []
    for row in rows:
        for sample in range(asked.samples):
            id_ = record_id("evaluate", row["parent_id"], sample)
            record = {**row, "id": id_, "sample": sample, "run_id": run_id_of(job.output)}
            tasks.append(Answer(record, controls))
    writer = open_writer(stage, job)
    run_tasks(job, tasks, lambda: writer, "answers")
    return probe(job, rows, stage, writer) if job.records and not asked.no_probes else {}


# ---------------------------------------------------------------------------------------------------------
# 4: scores


def score_file(path: str, limit: int, stage: Stage, judges: JudgeFlags) -> None:
    """Scores of answers that are there already: no model is loaded for them."""
    source, folder = Path(path), Path(stage.out.output)
    output = folder / "outputs.jsonl"
    if source.exists() and output.exists() and source.samefile(output):
        raise UserError(f"{source} is what this command would write", "--output ANOTHER_FOLDER")
    rows = select(read_rows(source, ready_made=True), stage.out.language, limit, path)
    about = {"model": "", "adapter": ""}
    settings = {"language": stage.out.language, "limit": limit}
    flags = {"overwrite": stage.out.overwrite, "allow_partial": stage.out.allow_partial}
    with Job("evaluate", output, inputs=[source], settings=settings, info=about, **flags) as job:
        for row in rows:
            if row["id"] not in job.done_ids:
                known = (row[k] for k in ("response", "finish", "response_tokens", "perplexity"))
                job.accept({**row, **measured(row, *known)})
        write_scores(job, rows, {"source": path, **about, "sampling": {}}, job.finish())
    finish(folder, path, judges, stage)


def write_scores(job: Job, rows: Sequence[dict], about: dict, summary: dict) -> None:
    """scores.json and length_following.png, beside the answers of a finished job; `rows`: what was asked."""
    folder = job.output.parent
    # Of a process that was killed while it wrote one of the two. Other files of the folder are not the job's: a judge
    # may be writing them right now.
    for name in ("scores.json", "length_following.png"):
        for leftover in folder.glob(f".{name}.*.tmp"):
            leftover.unlink(missing_ok=True)
    odd = contradictions(rows)
    # The file is in the order in which answers finished; the figure and the lists below are in the benchmark's.
    order = {row["parent_id"]: i for i, row in enumerate(rows)}
    outputs = sorted(map(complete, job.records), key=lambda r: (order[r["parent_id"]], r["sample"]))
    losses = summary.get("short_losses", [])
    scores = {
        **about,
        # By this `compare` knows whether two runs are like for like.
        "queries_hash": hash_of(json.dumps(sorted({query_of(row) for row in rows}))),
        **rounded({**score(outputs, losses), "seconds": summary["seconds"], "contradictions": len(odd)}),
        # What judges have said of exactly these answers, whenever they were asked.
        "quality": quality(folder, outputs),
        "unanswered": summary["rejected"],
        "contradicting": odd,
        "short_losses": losses,
        "short_tasks": summary.get("short_tasks", ""),
    }
    save_scores(folder, scores)
    # The figure is of demands: without any there is nothing to draw.
    if scores["constant_writer"]:
        cli.save_figure(folder / "length_following.png", lambda: length_following(outputs, scores, folder.name))


def save_scores(folder: Path, scores: dict) -> None:
    replace_file(folder / "scores.json", json.dumps(scores, ensure_ascii=False, indent=1) + "\n")


def finish(folder: Path, name: str, judges: JudgeFlags, stage: Stage) -> None:
    """Judge if judges are named, show the scores and emit them."""
    # A judge that fails costs nothing else: the scores are shown first, and then the command ends with the error.
    problems = judge_run(folder, judges, stage) if judges.judge else []
    scores = read_scores(folder)
    show_quality(scores["quality"])
    show(scores, f"{name} on {Path(scores['source']).name}")
    if scores["unanswered"]:
        cli.say(f"unanswered and in no score: {scores['unanswered']}")
    shown = {key: value for key, value in scores.items() if key not in DETAILS}
    cli.emit({"stage": "evaluate", "output": str(folder), "rejected": scores["unanswered"], **shown})
    raise_worst(problems)


# ---------------------------------------------------------------------------------------------------------
# judge


def judge_run(folder: Path, judges: JudgeFlags, stage: Stage) -> list[UserError]:
    """Ask judges about the answers of a scored run, and put what they say into its scores.json.

    Returns what went wrong: what did not is kept, and the caller raises when it has shown that.
    """
    path = folder / "outputs.jsonl"
    read_scores(folder)
    # Answers still being written would be judged, but not all of them: refused unless --allow-partial says so.
    check_inputs([path], stage.out.allow_partial)
    if not (outputs := read_outputs(path)):
        raise UserError(f"{path} holds no record", "run the evaluate.py command that writes it again")
    problems = judge_answers(folder, outputs, judges, stage)
    # Read again: another command may have written it in the hours that a judge takes.
    save_scores(folder, {**read_scores(folder), "quality": quality(folder, outputs, judges.judge)})
    return problems


# ---------------------------------------------------------------------------------------------------------

COMMANDS = {
    "answer": "let a model answer a benchmark and score the answers; the default",
    "score": "score ready-made answers",
    "judge": "let models judge the answers of a run",
    "compare": "scores of runs side by side; with --judge, which of two runs' answers is better",
    "report": "write the HTML report of a run of run.py",
}
RENAMED = {"--outputs": "score", "--compare": "compare", "--report": "report"}  # flags that have become commands


def with_command(argv: Sequence[str]) -> list[str]:
    """The command line with its command: `answer` if none is named. UserError with today's spelling for an old one."""
    # `answer` takes flags only, so a first word that is not a flag is a command, perhaps a mistyped one.
    if argv and (argv[0] in ("-h", "--help") or not argv[0].startswith("-")):
        return list(argv)
    # "--compare A B --judge J" -> "compare A B --judge J": the values of the old flag come right after the command.
    for i, word in enumerate(argv):
        name, _, value = word.partition("=")
        if name in RENAMED:
            after = list(argv[i + 1 :])
            end = next((n for n, more in enumerate(after) if more.startswith("--")), len(after))
            now = [RENAMED[name], *([value] if value else []), *after[:end], *argv[:i], *after[end:]]
            raise UserError(f"{name} is a command now", f"python evaluate.py {shlex.join(now)}")
    return ["answer", *argv]


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, "evaluate.py")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sub = {name: cli.add_command(commands, name, help) for name, help in COMMANDS.items()}

    cli.add_flags(sub["answer"], "benchmark", BenchmarkFlags)
    cli.add_flags(sub["answer"], "output", OutputFlags, leave_out=("min_yield",))
    cli.add_flags(sub["answer"], "model", ModelFlags)
    cli.add_flags(sub["answer"], "sampling", SamplingFlags)
    cli.add_flags(sub["answer"], "controls: what a longer answer costs without fine-tuning", ControlFlags)

    sub["score"].add_argument("file", metavar="FILE", help="JSONL with query and response")
    cli.add_flags(sub["score"], "benchmark", BenchmarkFlags, leave_out=("benchmark", "samples", "no_probes"))
    cli.add_flags(sub["score"], "output", OutputFlags, leave_out=("min_yield",))

    sub["judge"].add_argument("output", metavar="RUN", help="folder with outputs.jsonl and scores.json")
    sub["compare"].add_argument("runs", metavar="RUN", nargs="+", help="folders with scores.json")
    sub["compare"].add_argument("--output", default="", help="with --judge: where its verdicts are written")
    for name in ("judge", "compare"):
        cli.add_flags(sub[name], "output", OutputFlags, leave_out=("output", "language", "min_yield"))

    # A local judge runs on the device, and in the dtype, that the flags of a model name. `answer` has those flags for
    # its own model, and judges share them. How a judge's reply is sampled is not the user's choice: greedily.
    recipe = (*SamplingFlags().recipe(), "endpoint", "endpoint_path")
    for name in ("answer", "score", "judge", "compare"):
        cli.add_flags(sub[name], "judges", JudgeFlags)
        if name != "answer":
            cli.add_flags(sub[name], "local judges", ModelFlags, leave_out=("model", "adapter"))
            cli.add_flags(sub[name], "memory of local judges", SamplingFlags, leave_out=recipe)
            sub[name].set_defaults(model="", adapter="")
    sub["report"].add_argument("run", metavar="RUN", help="the run's folder, as in run.py --run")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(with_command(sys.argv[1:] if argv is None else argv))
    if args.command == "report":
        path = write_report(Path(args.run))
        cli.say(str(path))
        cli.emit({"stage": "report", "report": str(path), "bytes": path.stat().st_size})
        return
    stage = Stage(cli.take(args, OutputFlags), cli.take(args, ModelFlags), cli.take(args, SamplingFlags))
    judges = cli.take(args, JudgeFlags)
    # A mistake in --judge is found now, not after hours of sampling.
    judges.check()
    match args.command:
        case "answer":
            answer(stage, cli.take(args, BenchmarkFlags), cli.take(args, ControlFlags), judges)
        case "score":
            score_file(args.file, args.limit, stage, judges)
        case "judge":
            if not judges.judge:
                raise UserError("no judge is named", f"python evaluate.py judge {args.output} --judge JUDGE")
            folder = Path(args.output)
            problems = judge_run(folder, judges, stage)
            judged = read_scores(folder)["quality"]
            show_quality(judged)
            cli.emit({"stage": "judge", "output": args.output, "quality": judged})
            raise_worst(problems)
        case "compare":
            if judges.judge and (len(args.runs) != 2 or not args.output):
                hint = "python evaluate.py compare RUN_A RUN_B --judge JUDGE --output FOLDER"
                raise UserError("compare with --judge takes two runs and an --output", hint)
            summary, problems = compare(args.runs), []
            if judges.judge:
                summary["pairwise"], problems = compare_runs(args.runs, judges, stage)
            cli.emit(summary)
            raise_worst(problems)


if __name__ == "__main__":
    cli.run(main)
