"""The numbers of a scores.json: how each is measured, its name and format, and how all are shown on a terminal."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from lengthen import cli
from lengthen.evaluation import intervals
from lengthen.evaluation.growth import Query, query_of
from lengthen.evaluation.measures import (
    OPENING_TOKENS,
    PREFIX_WORDS,
    compression,
    content_words,
    distinct_3,
    longbench_score,
    loop_by_tenth,
    mean,
    median,
    p90,
    spearman,
)
from lengthen.reading import check_types, located_records
from lengthen.records import KINDS, UserError, new_record
from lengthen.text.demands import full_marks, length_score
from lengthen.text.filters import is_loop

CONSTANT_WORDS = (250, 500, 1000, 2000, 4000, 8000)  # the fixed constant writers; LonGen's demands are 2,000 to 8,000
LARGEST = 2**40  # a measurement above it is a mistake in the file, and its exponential no number
DEMANDS = {("about", True, True), ("range", True, True), ("above", True, False), ("below", False, True)}
POSITIONS = (0, *(64 << i for i in range(15)))  # tokens; where the buckets of the perplexity by position begin and end
GROUPS = ("type", "range", "language")  # scores.json has a table by_… of each

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
    ("longbench_score", "LongBench-Write's length score", "{:.1f}"),
    ("rank_correlation", "rank correlation wanted/written", "{:+.2f}"),
    ("distinct_3", f"distinct-3, first {PREFIX_WORDS} words", "{:.3f}"),
    ("compression", f"zlib compression, first {PREFIX_WORDS} words", "{:.2f}"),
    ("content_words", "query's content words used", "{:.1%}"),
    ("perplexity", "perplexity, median (own answers)", "{:.2f}"),
    ("own_prompt_gain", f"gain by the own query, first {OPENING_TOKENS} tokens", "{:.3f}"),
    ("own_prompt_share", "  answers for which it is above 0", "{:.1%}"),
    ("short_loss", "short tasks, nats per token", "{:.3f}"),
    ("tokens", "tokens", "{:,.0f}"),
    ("seconds", "seconds", "{:,.0f}"),
)


def complete(row: dict) -> dict:
    """An "output" record of any version: fields that it was written too early to have are empty."""
    return new_record("output", **{k: v for k, v in row.items() if k in KINDS["output"].__annotations__})


def read_outputs(path: Path) -> list[dict]:
    """The answers of a run, which people edit; [] where the file is missing or empty. UserError for a wrong value."""
    outputs = []
    rows = located_records(path, ("id", "query", "language")) if path.exists() and path.stat().st_size else ()
    for where, row in rows:
        output = complete(row)
        check_types(output, KINDS["output"].__annotations__, where)
        numbers = [x for x in output.values() if isinstance(x, (int, float))] + output["base_losses"]
        demand = output["type"], output["min_words"] > 0, output["max_words"] > 0
        if not all(-LARGEST < x < LARGEST for x in numbers) or (output["length_score"] >= 0 and demand not in DEMANDS):
            raise UserError(
                f"{where}: a number or a demand that evaluate.py does not write", "evaluate.py … --overwrite"
            )
        outputs.append(output)
    return outputs


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


def has_demand(row: dict) -> bool:
    return row["length_score"] >= 0


def has_ended(row: dict) -> bool:
    return row["finish"] == "eos"


def own_prompt_gain(row: dict) -> float | None:
    """Nats per token by which the answer's beginning is likelier after its own query than after another one."""
    return row["shuffled_loss"] - row["own_loss"] if row["shuffled_loss"] >= 0 else None


# key of scores.json -> what it takes of an answer (None: the answer does not count), and what it makes of all of these
MEASURES: dict[str, tuple[Callable[[dict], Any], Callable[[list], float | None]]] = {
    # of answers that ended by EOS: the others' length is the limit's
    "words_median": (lambda r: r["response_words"] if has_ended(r) else None, median),
    "words_p90": (lambda r: r["response_words"] if has_ended(r) else None, p90),
    "words_median_all": (lambda r: r["response_words"], median),
    "words_p90_all": (lambda r: r["response_words"], p90),
    "eos_share": (lambda r: has_ended(r) if r["finish"] else None, mean),
    "loop_rate": (lambda r: r["finish"] == "repetition" or is_loop(r["response"], r["language"]), mean),
    "length_score": (lambda r: 100 * r["length_score"] if has_demand(r) else None, mean),
    "length_score_eos": (lambda r: 100 * r["length_score"] if has_demand(r) and has_ended(r) else None, mean),
    "longbench_score": (
        lambda r: longbench_score(r["response_words"], wanted_words(r)) if has_demand(r) else None,
        mean,
    ),
    "rank_correlation": (lambda r: (wanted_words(r), r["longen_words"]) if has_demand(r) else None, spearman),
    "distinct_3": (lambda r: distinct_3(r["response"]), mean),
    "compression": (lambda r: compression(r["response"]), mean),
    "content_words": (lambda r: content_words(r["query"], r["response"], r["language"]), mean),
    "perplexity": (lambda r: r["perplexity"] if r["perplexity"] >= 0 else None, median),
    "own_prompt_gain": (own_prompt_gain, mean),
    "own_prompt_share": (lambda r: None if (gain := own_prompt_gain(r)) is None else gain > 0, mean),
}
OF_GROUPS = ("length_score", "rank_correlation", "eos_share", "words_median", "words_p90")


def measured(outputs: Sequence[dict]) -> list[dict]:
    """What each answer gives to each measure, and as "query" what it answers."""
    return [{"query": query_of(r), **{key: of(r) for key, (of, _) in MEASURES.items()}} for r in outputs]


def values_of(key: str, answers: Sequence[dict]) -> dict[Query, list]:
    """What the answers to each query give to a measure."""
    return intervals.by_query((answer["query"], answer[key]) for answer in answers)


def overall(key: str, answers: Sequence[dict]) -> float | None:
    return MEASURES[key][1]([answer[key] for answer in answers if answer[key] is not None])


def score(outputs: Sequence[dict], short_losses: Sequence[float] = ()) -> dict:
    """All scores of a list of "output" records (at least one), with the interval of each measure over the queries.

    Shares are 0..1, length scores points of 100, losses and gains nats per token.
    """
    answers = measured(outputs)
    demanding = [r for r in outputs if has_demand(r)]
    counted = [r["response_tokens"] for r in outputs if r["response_tokens"] >= 0]
    tenths = [t for r in outputs if (t := loop_by_tenth(r["response"], r["language"]))]
    groups: dict[str, dict[str, dict]] = {f"by_{field}": {} for field in GROUPS}
    for field in GROUPS:
        for value in sorted({r[field] for r in outputs if r[field]}):
            group = [a for a, r in zip(answers, outputs, strict=True) if r[field] == value]
            groups[f"by_{field}"][value] = {"answers": len(group), **{key: overall(key, group) for key in OF_GROUPS}}
    trust = {key: intervals.bootstrap(values_of(key, answers), total) for key, (_, total) in MEASURES.items()}
    trust["short_loss"] = intervals.bootstrap({task: [loss] for task, loss in enumerate(short_losses)}, mean)
    return {
        "rows": len({r["parent_id"] for r in outputs}),
        "answers": len(outputs),
        **{key: overall(key, answers) for key in MEASURES},
        "short_loss": mean(short_losses),
        "intervals": trust,
        "finishes": dict(Counter(r["finish"] or "unknown" for r in outputs).most_common()),
        "loop_by_tenth": [mean(tenth) for tenth in zip(*tenths, strict=True)] or None,
        "base_perplexity_by_position": perplexity_by_position(outputs) or None,
        "distinct_3_answers": sum(answer["distinct_3"] is not None for answer in answers),
        "tokens": sum(counted) if counted else None,
        "constant_writer": constant_writer(demanding) if demanding else None,
        **groups,
    }


def perplexity_by_position(outputs: Sequence[dict]) -> list[list[float]]:
    """[from token, to token, base model's perplexity of all tokens there], up to the end of the longest answer.

    Far positions have the tokens of the long answers only: read it within a run, or between runs of like lengths.
    """
    result = []
    for i, (start, stop) in enumerate(pairwise(POSITIONS)):
        parts = [
            (r["base_losses"][i], min(r["base_tokens"], stop) - start) for r in outputs if len(r["base_losses"]) > i
        ]
        if parts:
            loss = sum(loss * count for loss, count in parts) / sum(count for _, count in parts)
            result.append([start, stop, math.exp(loss)])
    return result


def rounded(value: Any) -> Any:
    """The same JSON value with floats of at most 4 decimals: more would be noise."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value


def cell(value: float | None, form: str = "{:,.0f}", interval: Sequence[float] | None = None) -> str:
    """362 [301, 420]; the sign of the unit, where there is one, only with the value."""
    text = "-" if value is None else form.format(value)
    return text + (f" [{', '.join(form.format(end).strip('x%') for end in interval)}]" if interval else "")


def headlines(scores: dict) -> dict:
    return {**scores, "constant_best": (scores["constant_writer"] or {}).get("best")}


def show(scores: dict, title: str) -> None:
    """Two tables on stderr: the run as a whole with 95 % intervals over queries, and its groups."""
    table = Table(title=cli.shown(title), show_header=False)
    table.add_column("measure")
    table.add_column("value", justify="right")
    for key, name, form in HEADLINES:
        table.add_row(name, cell(headlines(scores)[key], form, scores["intervals"].get(key)))
    cli.console.print(table)
    if any(scores["loop_by_tenth"] or ()):
        cli.say(f"words in loops, by tenth of the answer: {' '.join(f'{x:.0%}' for x in scores['loop_by_tenth'])}")
    if positions := scores["base_perplexity_by_position"]:
        cli.say("base model's perplexity from token " + ", ".join(f"{a}: {x:.1f}" for a, _, x in positions))

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
            table.add_row(cli.shown(value), *(cell(part[key], form) for key, _, form in columns))
        table.add_section()
    cli.console.print(table)
    if constant := scores["constant_writer"]:
        fixed = ", ".join(f"{int(words):,} words {value:.1f}" for words, value in constant["fixed"].items())
        cli.say(f"always writing {constant['best_words']:,} words would score {constant['best']:.1f}; {fixed}")
