"""Evaluate: sample a benchmark whose queries ask for a length, and measure what comes back.

    1. read the benchmark: LonGen's JSONL format, one length demand ("around 3000 words", "小于5000字") per query
    2. let the model answer every query --samples times, with the prompt rendering of training
    3. score each answer's length with LonGen's published formula and word count, and the whole with controls:
       - rank correlation between wanted and written lengths: does the model follow, or is it merely long?
       - constant writer: what always writing N words would score on the same queries, for the best N and fixed ones
       - share of answers that end by EOS, share that loop and where, distinct-3 and compression of equal prefixes
    4. probe with the model that is loaded: is an answer's beginning likelier behind its own query than behind the next
       one (is it about its query?), how does the base model's perplexity run along it (does it decay?), and how likely
       are the short answers of prompts/short_tasks.jsonl (has the model forgotten how to be brief?).
       On a CPU this takes a third of the sampling's time (SmolLM2: 36 s and 109 s); --no-probes leaves it out
    5. with --judge, let models score relevance, coherence, ... of each answer, length ignored (evaluation/judge.py),
       with --compare also say which of two runs' answers is better, in both orders
    6. write outputs.jsonl (records "output"), scores.json and length_following.png to the folder --output. Beside each
       number stands its 95 % interval over queries (evaluation/intervals.py), in --compare also that of the difference

Reads   prompts/bench_mini.jsonl ("mini"), any JSONL with language, range, type, constraint, query, or a data set of
        the hub; or, with --outputs, ready-made answers (query, response; the benchmark's fields, finish where known).
Writes  OUTPUT/outputs.jsonl one finished answer a line: killed and started again, it goes on where it was.
        OUTPUT/scores.json   length scores in points of 100, shares in 0..1, losses in nats per token, words by the
                             strict measure (lengthen.text.count_words) unless named longen_words; null = not defined
                             or not measured.
        OUTPUT/judgements.jsonl  one verdict a line, likewise; comparison.json with --compare

Departures from the release (eval/ of QwenLM/Self-Lengthen)
    1. The average length score is never shown alone: a writer who ignores the query and always writes 4,000 words gets
       67.8 of LonGen's 100 points. Rank correlation and constant writer stand beside it.
    2. Answers cut by the token limit or by the loop detector are scored and counted apart: their length is not theirs.
    3. Queries that do not state their demand (LonGen has four) are listed, not mended.
    4. Both ways to write a number, both languages, one command.

Examples
    python evaluate.py --model smollm2 --benchmark mini --language en --limit 8 --output runs/try/base
    python evaluate.py --model Qwen/Qwen2.5-7B-Instruct --benchmark quanshr/LonGen --output runs/qwen/eval/base
    python evaluate.py --outputs answers.jsonl --output runs/answers
    python evaluate.py --compare runs/demo/eval/base runs/demo/eval/final
    python evaluate.py --report runs/demo
    python evaluate.py --outputs answers.jsonl --output runs/answers --judge smollm2 http://127.0.0.1:8000/v1
    python evaluate.py --compare runs/a runs/b --judge http://127.0.0.1:8000/v1=NAME --output runs/a_or_b
"""

import argparse
import hashlib
import json
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lengthen import cli
from lengthen.evaluation import judge
from lengthen.evaluation.compare import compare
from lengthen.evaluation.measures import OPENING_TOKENS
from lengthen.evaluation.report.figures import length_following
from lengthen.evaluation.report.page import write_report
from lengthen.evaluation.scores import POSITIONS, complete, rounded, score, show
from lengthen.jobs import Job
from lengthen.records import (
    UserError,
    draw_seed,
    filter_language,
    fingerprint,
    new_record,
    prompt_id,
    read_jsonl,
    record_id,
    replace_file,
    run_id_of,
)
from lengthen.stage import Stage, open_model, sampling_of
from lengthen.text.demands import length_score, parse_demand, stated_demands
from lengthen.text.words import count_words, detect_language, longen_words

if TYPE_CHECKING:
    from torch import Tensor

    from lengthen.models.chat import Chat
    from lengthen.models.loading import LoadedModel
    from lengthen.sampling.engine import Sampler

BENCHMARKS = {"mini": Path(__file__).parent / "prompts" / "bench_mini.jsonl"}
SHORT_TASKS = Path(__file__).parent / "prompts" / "short_tasks.jsonl"
AT_LEAST = {"en": " Write at least {words} words.", "zh": "请至少写{words}字。"}  # behind the query: a control

# ---------------------------------------------------------------------------------------------------------
# The benchmark


def find_benchmark(name: str) -> Path:
    """The file behind --benchmark: a known name, a path, or the one JSONL file of a data set on the hub."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.endswith((".jsonl", ".json")):
        return Path(name)  # read_jsonl says what is wrong with it, if anything
    hint = "download its JSONL file where there is a network and give --benchmark FILE, or use --benchmark mini"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{name} is no file, and huggingface_hub is not installed", "pip install -U huggingface_hub"
        ) from None
    try:
        folder = Path(snapshot_download(name, repo_type="dataset", allow_patterns="*.jsonl"))
    except (OSError, ValueError) as error:  # all errors of the hub's client are one or the other
        raise UserError(f"{name} is no file, and the hub did not give it: {str(error).splitlines()[0]}", hint) from None
    files = sorted(folder.rglob("*.jsonl"))
    if len(files) != 1:
        found = ", ".join(str(f.relative_to(folder)) for f in files) or "none"
        raise UserError(f"{name} must hold one JSONL file, found: {found}", hint)
    return files[0]


def read_rows(path: Path, ready_made: bool = False) -> list[dict]:
    """The queries of a file as "output" records whose answer is still empty, or, `ready_made`, is in the file.

    A benchmark states a demand in every row, "" for none; ready-made answers need not. Raises UserError with file and
    line.
    """
    rows, occurrences = [], Counter()
    fields = ("id", "range", "type", "constraint", *(("parent_id", "response", "finish") if ready_made else ()))
    for line, row in enumerate(read_jsonl(path, ("query",)), start=1):
        where = f"{path}, line {line}"
        if not ready_made and not isinstance(row.get("constraint"), str):
            raise UserError(f"{where}: no field 'constraint', a string is needed", '"" where no length is asked for')
        if ready_made and "response" not in row:  # "" is an answer, and scores 0
            raise UserError(f"{where}: no field 'response', a string is needed", "a benchmark goes to --benchmark")
        for field in fields:
            if not isinstance(row.get(field, ""), str):
                raise UserError(f"{where}: a {type(row[field]).__name__} in the field {field!r}, a string is needed")
        known = {field: row.get(field, "") for field in fields}
        language = row.get("language") or detect_language(row["query"])
        if not language:
            raise UserError(f"{where}: no language given, and the query is neither English nor Chinese")
        if known["constraint"]:
            known |= read_demand(known["constraint"], language, known["type"], where)
        number = occurrences[language, row["query"]]
        occurrences[language, row["query"]] += 1
        if ready_made:  # an equal query is another answer to it
            sample = row["sample"] if isinstance(row.get("sample"), int) else number
            parent = known["parent_id"] or prompt_id(language, row["query"])
            known |= {k: row[k] for k in ("response_tokens", "base_tokens") if isinstance(row.get(k), int)}
            losses = ("perplexity", "own_loss", "shuffled_loss")
            known |= {k: float(row[k]) for k in losses if isinstance(row.get(k), (int, float))}
            if isinstance(row.get("base_losses"), list) and all(
                isinstance(x, (int, float)) for x in row["base_losses"]
            ):
                known["base_losses"] = row["base_losses"]
        else:  # an equal query is another query
            sample, parent = 0, known.pop("id") or prompt_id(language, row["query"], number)
        known["id"] = known.get("id") or record_id("evaluate", parent, sample)
        known |= {"parent_id": parent, "sample": sample, "attempt": 0, "language": language, "query": row["query"]}
        rows.append(new_record("output", **known))
    return rows


def read_demand(constraint: str, language: str, label: str, where: str) -> dict:
    """type, min_words and max_words of a constraint; `label` is the type that the file gives, "" for none."""
    try:
        kind, low, high = parse_demand(constraint, language)
    except ValueError:
        hint = 'write it as LonGen does: "around 3000 words", "2000-3000 words", "more than 4000 words", "小于五千字"'
        raise UserError(f"{where}: cannot read the constraint {constraint!r}", hint) from None
    if label not in ("", kind):
        raise UserError(
            f"{where}: type {label!r}, but the constraint {constraint!r} says {kind!r}", "mend or drop `type`"
        )
    return {"type": kind, "min_words": low, "max_words": high}


def contradictions(rows: Sequence[dict]) -> list[dict]:
    """The queries that do not ask for what they are scored by: a number of the demand is not stated in them."""
    found = []
    for row in {r["parent_id"]: r for r in rows if r["constraint"]}.values():
        stated = {n for demand in stated_demands(row["query"], row["language"]) for n in demand[1:]}
        if missing := {row["min_words"], row["max_words"]} - {-1} - stated:
            why = f"the query does not say {', '.join(map(str, sorted(missing)))}"
            fields = ("parent_id", "language", "range", "type", "constraint", "query")
            found.append({"why": why, **{k: row[k] for k in fields}})
    return found


# ---------------------------------------------------------------------------------------------------------
# Answers


def answered(row: dict, response: str, finish: str, response_tokens: int, perplexity: float = -1.0) -> dict:
    """The row with an answer and everything that is measured on the answer alone."""
    words = longen_words(response)
    demand = row["type"], row["min_words"], row["max_words"]
    return {
        **row,
        "response": response,
        "response_words": count_words(response),
        "longen_words": words,
        "response_tokens": response_tokens,
        "finish": finish,
        "length_score": round(length_score(words, *demand), 6) if row["constraint"] else -1.0,
        "perplexity": round(perplexity, 4),
    }


def ask_model(job: Job, rows: Sequence[dict], args: argparse.Namespace) -> dict[str, Any]:
    """Answers and probes, by a model that is gone when this returns: a judge may need its memory."""
    loaded, sampler = open_model(stage_of(args), job)
    sample_answers(job, rows, args, loaded, sampler)
    return probe(job, rows, args, loaded, sampler) if not args.no_probes and job.records else {}


def sample_answers(
    job: Job, rows: Sequence[dict], args: argparse.Namespace, loaded: "LoadedModel", sampler: "Sampler"
) -> None:
    """Answer what is not answered yet; each answer is on disk as soon as it is finished."""
    from lengthen.sampling.request import Request  # torch comes with it: ready-made answers do without

    sampling = replace(sampling_of(cli.take(args, cli.SamplingFlags)), min_new_tokens=args.min_new_tokens)
    waiting = {}
    for row in rows:
        told = AT_LEAST[row["language"]].format(words=args.at_least) if args.at_least else ""
        prompt_ids = prompt_of(loaded.chat, row["query"] + told)
        expected = max(0, row["min_words"], row["max_words"]) * 4 // 3  # tokens for so many words; 0 = not known
        for sample in range(args.samples):
            id_ = record_id("evaluate", row["parent_id"], sample)
            if id_ not in job.done_ids:
                waiting[id_] = {**row, "id": id_, "sample": sample, "run_id": run_id_of(job.output)}
                seed = draw_seed(args.seed, id_, 0)
                sampler.add(Request(id_, prompt_ids, seed, sampling, expected_tokens=expected))
    with cli.progress("answers", len(rows) * args.samples) as bar:
        bar.update(len(job.done_ids))
        for sample in sampler.run():
            row = waiting.pop(sample.request.key)
            if sample.finish == "error":
                cli.say(f"  {row['id']}: {sample.error}")
                job.reject(row, "context")
            else:
                [logprobs] = sampler.logprobs([(sample.request.prompt_ids, sample.token_ids)])
                perplexity = math.exp(-logprobs.mean().item())
                job.accept(answered(row, sample.text, sample.finish, sample.num_tokens, perplexity))
            bar.update(len(job.done_ids), str(sampler.progress()))


# ---------------------------------------------------------------------------------------------------------
# Probes: what the loaded model says of texts that are there, in a few passes. Nothing is written by it.


def probe(
    job: Job, rows: Sequence[dict], args: argparse.Namespace, loaded: "LoadedModel", sampler: "Sampler"
) -> dict[str, Any]:
    """Measure the answers under the base model (into their records) and the short tasks under the evaluated one."""
    from lengthen.models.lora import without_adapter
    from lengthen.sampling.engine import Sampler

    began = time.monotonic()
    tasks = filter_language(read_jsonl(SHORT_TASKS, ("prompt", "answer")), args.language)
    losses = short_losses(tasks, loaded.chat, sampler)
    if args.adapter:
        sampler.close()  # it holds copies of the weights, in which the adapter is merged
        with without_adapter(loaded.model, args.adapter):
            room = {"context": sampler.context, "kv_tokens": sampler.context}  # for one text: nothing is decoded
            with Sampler(loaded.model, loaded.tokenizer, eos_ids=sampler.eos_ids, **room) as base:
                probe_answers(job, rows, loaded.chat, base)
    else:
        probe_answers(job, rows, loaded.chat, sampler)
    cli.say(f"probes: {len(job.records)} answers and {len(losses)} short tasks in {time.monotonic() - began:.1f} s")
    return {"short_losses": losses, "short_tasks": hash_of(tasks)}


def short_losses(tasks: Sequence[dict], chat: "Chat", sampler: "Sampler") -> list[float]:
    """Nats per token of the short tasks' answers, their ends included: long writers find an early end unlikely."""
    pairs = [(prompt_of(chat, task["prompt"]), chat.encode_answer(task["answer"])) for task in tasks]
    return [round(-values.mean().item(), 4) for values in sampler.logprobs(pairs)]


def probe_answers(job: Job, rows: Sequence[dict], chat: "Chat", sampler: "Sampler", batch: int = 8) -> None:
    """base_tokens, base_losses, own_loss and shuffled_loss of every answer: each batch is on disk when it is done.

    Texts are encoded afresh, so that an answer read back from disk is measured like one that has just been sampled.
    """
    answered = {r["parent_id"] for r in job.records}
    queries = [(r["language"], r["query"]) for r in rows if r["parent_id"] in answered]
    prompts = {query: prompt_of(chat, query[1]) for query in queries}
    other = next_queries(list(prompts))
    found = {note["id"]: note for note in job.journal}
    todo = [r for r in job.records if r["id"] not in found]
    with cli.progress("probes", len(job.records)) as bar:
        for start in range(0, len(todo), batch):
            bar.update(len(found))
            part, pairs = todo[start : start + batch], []
            for row in part:
                query = row["language"], row["query"]
                own, strange = prompts[query], prompts[other[query]]
                # Encoded again, or behind a longer prompt, a text may no longer fit: its end is left out.
                ids = chat.encode_text(row["response"])[: sampler.context - max(len(own), len(strange))]
                pairs += [(own, ids), (strange, ids[:OPENING_TOKENS])] if other[query] != query else [(own, ids)]
            losses = iter([-values for values in sampler.logprobs(pairs)])
            for row in part:
                query = row["language"], row["query"]
                found[row["id"]] = probed(next(losses), next(losses) if other[query] != query else None)
                job.note({"id": row["id"], **found[row["id"]]})
    job.amend(found)


def prompt_of(chat: "Chat", query: str) -> list[int]:
    return chat.encode([{"role": "user", "content": query}])


def next_queries(queries: Sequence[tuple[str, str]]) -> dict:
    """(language, text) -> the next query of its language, behind the last one the first; itself where it is alone."""
    by_language = {language: [q for q in queries if q[0] == language] for language, _ in queries}
    return {a: b for same in by_language.values() for a, b in zip(same, [*same[1:], same[0]], strict=True)}


def probed(own: "Tensor", strange: "Tensor | None") -> dict[str, Any]:
    """The fields of an "output" record, from the losses of its tokens behind its own and behind another query."""
    if not len(own):
        return {}
    parts = [own[a:b] for a, b in pairwise(POSITIONS) if a < len(own)]
    return {
        "base_tokens": len(own),
        "base_losses": [round(part.mean().item(), 4) for part in parts],
        "own_loss": round(own[:OPENING_TOKENS].mean().item(), 4),
        "shuffled_loss": -1.0 if strange is None else round(strange.mean().item(), 4),
    }


# ---------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__, "evaluate.py")
    what = parser.add_argument_group("what is evaluated (one of the four)").add_mutually_exclusive_group()
    what.add_argument(
        "--benchmark", default=None, help="mini, a JSONL file in LonGen's format, or a hub data set id; empty = mini"
    )
    what.add_argument("--outputs", default="", help="JSONL of ready-made answers to score; loads no model")
    what.add_argument("--compare", nargs="+", metavar="RUN", help="folders with scores.json: print them side by side")
    what.add_argument("--report", default="", metavar="RUN", help="a run's folder: write its report.html")
    group = parser.add_argument_group("input / output")
    group.add_argument("--limit", type=cli.at_least(0), default=0, help="only the first N queries; 0 = all")
    group.add_argument("--samples", type=cli.at_least(1), default=1, help="answers per query")
    group.add_argument("--output", default="", help="what is written; run the same command again to continue it")
    cli.add_flags(parser, "output", cli.OutputFlags, leave_out=("output", "min_yield"))
    group.add_argument("--no-probes", action="store_true", help="leave out what a model is asked about the answers")
    parser.add_argument("--model", default="", help="hub id, local folder, .gguf file, or smollm2 (the demo's model)")
    cli.add_flags(parser, "model", cli.ModelFlags, leave_out=("model",))
    cli.add_flags(parser, "sampling", cli.SamplingFlags)
    group = parser.add_argument_group("controls: what a longer answer costs without fine-tuning")
    group.add_argument(
        "--at-least", type=cli.at_least(0), default=0, help="ask each query for N words or more; 0 = off"
    )
    group.add_argument("--min-new-tokens", type=cli.at_least(0), default=0, help="ban EOS from the first N tokens")
    judge.add_flags(parser)
    args = parser.parse_args(argv)
    # Not as the flag's default: argparse would let "--outputs X --benchmark mini" pass.
    args.benchmark = args.benchmark or "mini"
    if not args.compare and not args.report:
        for flag, needed in (("output", True), ("model", not args.outputs)):
            if needed and not getattr(args, flag):
                raise UserError(f"the following arguments are required: --{flag}", "python evaluate.py --help")
    judge.check_flags(args)
    return args


def stage_of(args: argparse.Namespace) -> Stage:
    return Stage(cli.take(args, cli.OutputFlags), cli.take(args, cli.ModelFlags), cli.take(args, cli.SamplingFlags))


def hash_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def select(rows: list[dict], args: argparse.Namespace, source: str) -> list[dict]:
    """The rows of the asked language, then the first --limit of them; says what it leaves out."""
    kept = filter_language(rows, args.language)
    if skipped := len(rows) - len(kept):
        cli.say(f"{source}: {len(kept)} rows in {args.language}, {skipped} in the other language skipped")
    if not kept:
        raise UserError(f"{source} has no row in --language {args.language}", "--language both")
    return kept[: args.limit] if args.limit else kept


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.compare:
        summary, problems = compare(args.compare), []
        if args.judge:
            summary["pairwise"], problems = judge.compare_runs(args)
        cli.emit(summary)
        judge.tell(problems)
        return
    if args.report:
        path = write_report(Path(args.report))
        cli.say(str(path))
        cli.emit({"stage": "report", "report": str(path), "bytes": path.stat().st_size})
        return
    folder = Path(args.output)

    # 1) what is asked
    source = Path(args.outputs) if args.outputs else find_benchmark(args.benchmark)
    output = folder / "outputs.jsonl"
    if args.outputs and source.exists() and output.exists() and source.samefile(output):
        raise UserError(f"{source} is what this command would write", "--output ANOTHER_FOLDER")
    rows = select(read_rows(source, ready_made=bool(args.outputs)), args, args.outputs or args.benchmark)
    if odd := contradictions(rows):
        cli.say(f"{len(odd)} queries do not state their demand; they are scored as labelled and listed in scores.json")

    # 2) what is answered
    drawn = ("samples", "seed", "at_least", "min_new_tokens", "kv_cache")
    sampling = (
        {} if args.outputs else {**cli.take(args, cli.SamplingFlags).recipe(), **{k: getattr(args, k) for k in drawn}}
    )
    settings = {"language": args.language, "limit": args.limit, **sampling}
    if not args.outputs:
        settings |= {"model": fingerprint(args.model), "adapter": fingerprint(args.adapter), "quantize": args.quantize}
    flags = {"overwrite": args.overwrite, "allow_partial": args.allow_partial}
    info = {"model": args.model or "", "adapter": args.adapter}
    with Job("evaluate", output, inputs=[source], settings=settings, info=info, journal=True, **flags) as job:
        for leftover in folder.glob(".*.tmp"):  # of a process killed while it wrote its scores; we hold the lock
            leftover.unlink()
        probes = {}
        if args.outputs:
            for row in rows:
                if row["id"] not in job.done_ids:
                    known = (row[k] for k in ("response", "finish", "response_tokens", "perplexity"))
                    job.accept(answered(row, *known))
        elif not job.complete:
            probes = ask_model(job, rows, args)
        elif not args.no_probes and all(r["base_tokens"] < 0 for r in map(complete, job.records)):
            cli.say("these answers were made without the probes; --overwrite makes them afresh, with them")
        summary = job.finish(**probes)

        # 3) what came of it, computed afresh each time. Sorted: the file is in finishing order.
        order = {row["parent_id"]: i for i, row in enumerate(rows)}
        outputs = sorted(map(complete, job.records), key=lambda r: (order[r["parent_id"]], r["sample"]))
        problems = judge.judge_answers(folder, outputs, args) if args.judge else []
        losses = summary.get("short_losses", [])
        scores = rounded({**score(outputs, losses), "seconds": summary["seconds"], "contradictions": len(odd)})
        scores["quality"] = judge.quality(folder, outputs, args.judge)
        about = {
            "source": args.outputs or args.benchmark,
            **info,
            "sampling": sampling,
            "queries_hash": hash_of(sorted({(r["language"], r["constraint"], r["query"]) for r in rows})),
        }
        tasks = {"short_losses": losses, "short_tasks": summary.get("short_tasks", "")}
        details = {"unanswered": summary["rejected"], "contradicting": odd, **tasks}
        text = json.dumps({**about, **scores, **details}, ensure_ascii=False, indent=1)
        replace_file(folder / "scores.json", text + "\n")
        if scores["constant_writer"]:
            replace_file(folder / "length_following.png", length_following(outputs, scores, folder.name))
    judge.show_quality(scores["quality"])
    show(scores, f"{args.outputs or args.model + (' + ' + args.adapter if args.adapter else '')} on {source.name}")
    if summary["rejected"]:
        cli.say(f"unanswered and in no score: {summary['rejected']}")
    cli.emit({"stage": "evaluate", "output": str(folder), "rejected": summary["rejected"], **scores})
    judge.tell(problems)


if __name__ == "__main__":
    cli.run(main)
