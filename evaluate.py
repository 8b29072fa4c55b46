"""Evaluate: sample a benchmark whose queries ask for a length, and measure what comes back.

    1. read the benchmark: LonGen's JSONL format, one length demand ("around 3000 words", "小于5000字") per query
    2. let the model answer every query --samples times, with the prompt rendering of training
    3. score each answer's length with LonGen's published formula and word count, and the whole with controls:
       - rank correlation between wanted and written lengths: does the model follow, or is it merely long?
       - constant writer: what always writing N words would score on the same queries, for the best N and fixed ones
       - share of answers that end by EOS, share that loop, distinct-3 over equally long prefixes
    4. write outputs.jsonl (records "output"), scores.json and length_following.png to the folder --output

Reads   prompts/bench_mini.jsonl ("mini"), any JSONL with language, range, type, constraint, query, or a data set of
        the hub; or, with --outputs, ready-made answers (query, response; the benchmark's fields, finish where known).
Writes  OUTPUT/outputs.jsonl one finished answer a line: killed and started again, it goes on where it was.
        OUTPUT/scores.json   length_score in points of 100, shares in 0..1, words by the strict measure
                             (lengthen.text.count_words) unless named longen_words; null = not defined here.

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
"""

import argparse
import hashlib
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from lengthen import cli
from lengthen.demands import full_marks, length_score, parse_demand, stated_demands
from lengthen.figures import length_following
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
from lengthen.stage import open_model, sampling_of
from lengthen.text import count_words, detect_language, is_loop, longen_words, tokens

BENCHMARKS = {"mini": Path(__file__).parent / "prompts" / "bench_mini.jsonl"}
CONSTANT_WORDS = (250, 500, 1000, 2000, 4000, 8000)  # the fixed constant writers; LonGen's demands are 2,000 to 8,000
PREFIX_WORDS = (
    200  # distinct-3 falls with length, so it is taken over the first so many words, shorter answers left out
)
GROUPS = ("type", "range", "language")
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
            if isinstance(row.get("response_tokens"), int):
                known["response_tokens"] = row["response_tokens"]
            if isinstance(row.get("perplexity"), (int, float)):
                known["perplexity"] = float(row["perplexity"])
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


def sample_answers(job: Job, rows: Sequence[dict], args: argparse.Namespace) -> None:
    """Answer what is not answered yet; each answer is on disk as soon as it is finished."""
    from lengthen.sampler import Request  # torch comes with it: ready-made answers do without

    loaded, sampler = open_model(args, job)
    sampling = replace(sampling_of(args), min_new_tokens=args.min_new_tokens)
    waiting = {}
    for row in rows:
        content = row["query"]
        if args.at_least:
            content += AT_LEAST[row["language"]].format(words=args.at_least)
        prompt_ids = loaded.chat.encode([{"role": "user", "content": content}])
        for sample in range(args.samples):
            id_ = record_id("evaluate", row["parent_id"], sample)
            if id_ not in job.done_ids:
                waiting[id_] = {**row, "id": id_, "sample": sample, "run_id": run_id_of(job.output)}
                sampler.add(Request(id_, prompt_ids, draw_seed(args.seed, id_, 0), sampling))
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
            bar.update(len(job.done_ids))


# ---------------------------------------------------------------------------------------------------------
# Measures. Each is a function of a list of "output" records or of plain numbers.


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, ties sharing their average."""
    order = sorted(range(len(values)), key=values.__getitem__)
    result, start = [0.0] * len(values), 0
    for stop in range(1, len(order) + 1):
        if stop == len(order) or values[order[stop]] != values[order[start]]:
            for i in order[start:stop]:
                result[i] = (start + 1 + stop) / 2
            start = stop
    return result


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties sharing ranks; None where a side is constant, or with fewer than 5 pairs."""
    if len(x) < 5 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return statistics.correlation(ranks(x), ranks(y))


def quantile(values: Sequence[float], q: float) -> float | None:
    """The q-quantile with linear interpolation (numpy's default); None of nothing."""
    if not values:
        return None
    ordered, place = sorted(values), q * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def wanted_words(row: dict) -> float:
    """The middle of what gets full marks: one number for "how long was it asked to be"."""
    return sum(full_marks(row["type"], row["min_words"], row["max_words"])) / 2


def constant_writer(outputs: Sequence[dict]) -> dict:
    """Scores (of 100) of writers who ignore the query: {"best_words", "best", "fixed": {words: score}}.

    The score is piecewise linear in the words and bends down only at the ends of full_marks: the best is one of them.
    """
    demands = Counter((r["type"], r["min_words"], r["max_words"]) for r in outputs)

    def total(words: int) -> float:
        return 100 * sum(n * length_score(words, *demand) for demand, n in demands.items()) / demands.total()

    corners = {f(x) for d in demands for a, b in [full_marks(*d)] for x in (a, b) for f in (math.floor, math.ceil)}
    best = max(sorted(corners), key=total)
    return {"best_words": best, "best": total(best), "fixed": {str(words): total(words) for words in CONSTANT_WORDS}}


def distinct_3(texts: Sequence[str]) -> tuple[float | None, int]:
    """Mean share of different word trigrams in the first PREFIX_WORDS words, and over how many texts it is taken."""
    shares = []
    for text in texts:
        words = tokens(text)[:PREFIX_WORDS]
        if len(words) == PREFIX_WORDS:
            shares.append(len(set(zip(words, words[1:], words[2:], strict=False))) / (PREFIX_WORDS - 2))
    return mean(shares), len(shares)


def summarise(outputs: Sequence[dict]) -> dict:
    """What is said of a whole run and of each of its groups alike."""
    asked = [r for r in outputs if r["length_score"] >= 0]
    ended = [r["response_words"] for r in outputs if r["finish"] == "eos"]
    known = [r for r in outputs if r["finish"]]
    score = mean([r["length_score"] for r in asked])
    return {
        "answers": len(outputs),
        "length_score": None if score is None else 100 * score,
        "rank_correlation": spearman([wanted_words(r) for r in asked], [r["longen_words"] for r in asked]),
        "eos_share": len(ended) / len(known) if known else None,
        "words_median": quantile(ended, 0.5),  # of answers that ended by EOS: the others' length is the limit's
        "words_p90": quantile(ended, 0.9),
    }


def score(outputs: Sequence[dict]) -> dict:
    """All scores of a list of "output" records (at least one). Shares are 0..1, length scores points of 100."""
    asked = [r for r in outputs if r["length_score"] >= 0]
    every = [r["response_words"] for r in outputs]
    counted = [r["response_tokens"] for r in outputs if r["response_tokens"] >= 0]
    perplexities = [r["perplexity"] for r in outputs if r["perplexity"] >= 0]
    ended = mean([r["length_score"] for r in asked if r["finish"] == "eos"])
    loops = [r["finish"] == "repetition" or is_loop(r["response"], r["language"]) for r in outputs]
    distinct, distinct_answers = distinct_3([r["response"] for r in outputs])
    groups = {f"by_{field}": {} for field in GROUPS}
    for field in GROUPS:
        for value in sorted({r[field] for r in outputs if r[field]}):
            groups[f"by_{field}"][value] = summarise([r for r in outputs if r[field] == value])
    return {
        "rows": len({r["parent_id"] for r in outputs}),
        **summarise(outputs),
        "words_median_all": quantile(every, 0.5),
        "words_p90_all": quantile(every, 0.9),
        "length_score_eos": None if ended is None else 100 * ended,
        "finishes": dict(Counter(r["finish"] or "unknown" for r in outputs).most_common()),
        "loop_rate": mean(loops),
        "distinct_3": distinct,
        "distinct_3_answers": distinct_answers,
        "perplexity": quantile(perplexities, 0.5),
        "tokens": sum(counted) if counted else None,
        "constant_writer": constant_writer(asked) if asked else None,
        **groups,
    }


def hash_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def rounded(value: object) -> object:
    """The same JSON value with floats of at most 4 decimals: more would be noise."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return round(value, 4) if isinstance(value, float) else value


# ---------------------------------------------------------------------------------------------------------
# What people look at


def cell(value: float | None, form: str = "{:,.0f}") -> str:
    return "-" if value is None else form.format(value)


HEADLINES = (  # key of scores.json, name, format
    ("rows", "queries", "{:,.0f}"),
    ("answers", "answers", "{:,.0f}"),
    ("words_median", "words, median (ended by EOS)", "{:,.0f}"),
    ("words_p90", "words, p90 (ended by EOS)", "{:,.0f}"),
    ("words_median_all", "words, median (all)", "{:,.0f}"),
    ("words_p90_all", "words, p90 (all)", "{:,.0f}"),
    ("eos_share", "ended by EOS", "{:.1%}"),
    ("loop_rate", "loops", "{:.1%}"),
    ("length_score", "length score, of 100", "{:.1f}"),
    ("length_score_eos", "length score (ended by EOS)", "{:.1f}"),
    ("constant_best", "  best constant writer", "{:.1f}"),
    ("rank_correlation", "rank correlation wanted/written", "{:+.2f}"),
    ("distinct_3", f"distinct-3, first {PREFIX_WORDS} words", "{:.3f}"),
    ("perplexity", "perplexity, median (own answers)", "{:.2f}"),
    ("tokens", "tokens", "{:,.0f}"),
    ("seconds", "seconds", "{:,.0f}"),
)


def headlines(scores: dict) -> dict:
    return {**scores, "constant_best": (scores["constant_writer"] or {}).get("best")}


def show(scores: dict, title: str) -> None:
    """Two tables on stderr: the run as a whole, and its groups."""
    table = Table(title=title, show_header=False)
    table.add_column("measure")
    table.add_column("value", justify="right")
    for key, name, form in HEADLINES:
        table.add_row(name, cell(headlines(scores)[key], form))
    cli.console.print(table)

    table = Table(title="By group (words of the answers that ended by EOS)")
    columns = (
        ("answers", "answers", "{:,.0f}"),
        ("words_median", "median words", "{:,.0f}"),
        ("eos_share", "EOS", "{:.0%}"),
        ("length_score", "length score", "{:.1f}"),
        ("rank_correlation", "wanted/written", "{:+.2f}"),
    )
    table.add_column("group")
    for _, name, _ in columns:
        table.add_column(name, justify="right")
    for field in GROUPS:
        for value, part in scores[f"by_{field}"].items():
            table.add_row(cli.printable(value), *(cell(part[key], form) for key, _, form in columns))
        table.add_section()
    cli.console.print(table)
    if constant := scores["constant_writer"]:
        fixed = ", ".join(f"{int(words):,} words {value:.1f}" for words, value in constant["fixed"].items())
        cli.say(f"always writing {constant['best_words']:,} words would score {constant['best']:.1f}; {fixed}")


def compare(folders: Sequence[str]) -> dict:
    """One table of the scores of several runs; words also as a multiple of the first run's."""
    runs = {}
    for folder in dict.fromkeys(str(Path(f)) for f in folders):
        path = Path(folder) / "scores.json"
        try:
            runs[folder] = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path} does not exist", f"python evaluate.py … --output {folder}  writes it") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}", "run the same evaluate.py command again") from None
    first = next(iter(runs.values()))
    table = Table(title="Scores side by side")
    table.add_column("measure")
    for folder in runs:
        table.add_column(cli.printable(folder), justify="right", overflow="fold")
    for key, name, form in HEADLINES:
        values = []
        for scores in runs.values():
            value, base = headlines(scores)[key], headlines(first)[key]
            growth = key.startswith("words") and scores is not first and value is not None and base
            values.append(cell(value, form) + (f"  x{value / base:.2f}" if growth else ""))
        table.add_row(name, *values)
    cli.console.print(table)
    for key, what in (("queries_hash", "other queries"), ("sampling", "other sampling settings")):
        if others := [f for f, scores in runs.items() if scores[key] != first[key]]:
            cli.say(f"not like for like: {', '.join(others)} with {what} than {next(iter(runs))}")
    keys = [key for key, _, _ in HEADLINES]
    return {"stage": "compare", "runs": {f: {k: headlines(s)[k] for k in keys} for f, s in runs.items()}}


# ---------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__, "evaluate.py")
    what = parser.add_argument_group("what is evaluated (one of the three)").add_mutually_exclusive_group()
    what.add_argument(
        "--benchmark", default=None, help="mini, a JSONL file in LonGen's format, or a hub data set id; empty = mini"
    )
    what.add_argument("--outputs", default="", help="JSONL of ready-made answers to score; loads no model")
    what.add_argument("--compare", nargs="+", metavar="RUN", help="folders with scores.json: print them side by side")
    group = parser.add_argument_group("input / output")
    group.add_argument("--limit", type=cli.at_least(0), default=0, help="only the first N queries; 0 = all")
    group.add_argument("--samples", type=cli.at_least(1), default=1, help="answers per query")
    group.add_argument("--output", default="", help="folder that is written; the same command again goes on with it")
    group.add_argument("--language", choices=("en", "zh", "both"), default="both", help="records of which language")
    group.add_argument("--seed", type=int, default=0, help="of every random draw in this stage")
    group.add_argument("--overwrite", action="store_true", help="start afresh instead of going on")
    group.add_argument("--allow-partial", action="store_true", help="accept --outputs whose stage has not finished")
    cli.add_model_flags(parser, required=False)
    cli.add_sampling_flags(parser)
    group = parser.add_argument_group("controls: what a longer answer costs without fine-tuning")
    group.add_argument(
        "--at-least", type=cli.at_least(0), default=0, help="ask each query for N words or more; 0 = off"
    )
    group.add_argument("--min-new-tokens", type=cli.at_least(0), default=0, help="ban EOS from the first N tokens")
    args = parser.parse_args(argv)
    args.benchmark = (
        args.benchmark or "mini"
    )  # not as the default: argparse would let "--outputs X --benchmark mini" pass
    if not args.compare:
        for flag, needed in (("output", True), ("model", not args.outputs)):
            if needed and not getattr(args, flag):
                raise UserError(f"the following arguments are required: --{flag}", "python evaluate.py --help")
    return args


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
        cli.emit(compare(args.compare))
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
    drawn = ("samples", "seed", "at_least", "min_new_tokens")
    sampling = {} if args.outputs else {**cli.sampling_settings(args), **{k: getattr(args, k) for k in drawn}}
    settings = {"language": args.language, "limit": args.limit, **sampling}
    if not args.outputs:
        settings |= {"model": fingerprint(args.model), "adapter": fingerprint(args.adapter), "quantize": args.quantize}
    flags = {"overwrite": args.overwrite, "allow_partial": args.allow_partial}
    info = {"model": args.model or "", "adapter": args.adapter}
    with Job("evaluate", output, inputs=[source], settings=settings, info=info, **flags) as job:
        for leftover in folder.glob(".*.tmp"):  # of a process killed while it wrote its scores; we hold the lock
            leftover.unlink()
        if args.outputs:
            for row in rows:
                if row["id"] not in job.done_ids:
                    known = (row[k] for k in ("response", "finish", "response_tokens", "perplexity"))
                    job.accept(answered(row, *known))
        elif not job.complete:
            sample_answers(job, rows, args)
        summary = job.finish()

        # 3) what came of it, computed afresh each time. Sorted: the file is in finishing order.
        order = {row["parent_id"]: i for i, row in enumerate(rows)}
        outputs = sorted(job.records, key=lambda r: (order[r["parent_id"]], r["sample"]))
        scores = rounded({**score(outputs), "seconds": summary["seconds"], "contradictions": len(odd)})
        about = {
            "source": args.outputs or args.benchmark,
            **info,
            "sampling": sampling,
            "queries_hash": hash_of(sorted({(r["language"], r["constraint"], r["query"]) for r in rows})),
        }
        details = {"unanswered": summary["rejected"], "contradicting": odd}
        text = json.dumps({**about, **scores, **details}, ensure_ascii=False, indent=1)
        replace_file(folder / "scores.json", text + "\n")
        if scores["constant_writer"]:
            replace_file(folder / "length_following.png", length_following(outputs, scores, folder.name))
    show(scores, f"{args.outputs or args.model + (' + ' + args.adapter if args.adapter else '')} on {source.name}")
    if summary["rejected"]:
        cli.say(f"unanswered and in no score: {summary['rejected']}")
    cli.emit({"stage": "evaluate", "output": str(folder), "rejected": summary["rejected"], **scores})


if __name__ == "__main__":
    cli.run(main)
