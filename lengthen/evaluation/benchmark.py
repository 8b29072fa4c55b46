"""The benchmark: queries that ask for a length, in LonGen's JSONL format; or answers to them that are ready-made."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from lengthen import cli
from lengthen.evaluation.scores import LARGEST, POSITIONS
from lengthen.reading import filter_language, located_records
from lengthen.records import UserError, new_record, prompt_id, record_id
from lengthen.text.demands import parse_demand, stated_demands
from lengthen.text.languages import files
from lengthen.text.thoughts import strip_thoughts

LARGEST_LOSS = 100.0  # nats per token: above it, it was no model that wrote it
BENCHMARKS = {"mini": "bench_mini.jsonl"}  # files of prompts/LANGUAGE/


def find_benchmark(name: str, language: str = "all") -> list[Path]:
    """What --benchmark names: a known name (a file per language), a path, or the one JSONL file of a hub data set."""
    if name in BENCHMARKS:
        if found := files(BENCHMARKS[name], language):
            return found
        raise UserError(f"--benchmark {name} has no queries in --language {language}", "--language all")
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.endswith((".jsonl", ".json")):
        return [Path(name)]  # reading it says what is wrong with it, if anything
    hint = "download its JSONL file where there is a network and give --benchmark FILE, or use --benchmark mini"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{name} is not a file, and huggingface_hub is not installed", "pip install -U huggingface_hub"
        ) from None
    try:
        folder = Path(snapshot_download(name, repo_type="dataset", allow_patterns="*.jsonl"))
    except (OSError, ValueError) as error:  # all errors of the hub's client are one or the other
        why = str(error).splitlines()[0]
        raise UserError(f"{name} is not a file, and the hub did not give it: {why}", hint) from None
    found = sorted(folder.rglob("*.jsonl"))
    if len(found) != 1:
        names = ", ".join(str(f.relative_to(folder)) for f in found) or "none"
        raise UserError(f"{name} must hold one JSONL file, it has: {names}", hint)
    return found


def read_rows(path: Path, ready_made: bool = False) -> list[dict]:
    """The queries of a file as "output" records whose answer is still empty, or, `ready_made`, is in the file.

    A benchmark states a demand in every row, "" for none; ready-made answers may leave it out. Raises UserError with
    file and line.
    """
    rows: list[dict] = []
    occurrences: Counter[tuple[str, str]] = Counter()  # of (language, query)
    ids: dict[str, str] = {}  # -> where
    used: set[tuple[str, int]] = set()  # (query's id, sample) of ready-made answers
    for where, row in located_records(path, ("query",), spoken=("query",)):
        language = row["language"]
        known = checked_fields(row, ready_made, where)
        if known["constraint"]:
            known |= read_demand(known["constraint"], language, known["type"], where)
        occurrence = occurrences[language, row["query"]]
        occurrences[language, row["query"]] += 1
        if ready_made:  # an equal query is another answer to it
            parent = known["parent_id"] or prompt_id(language, row["query"])
            sample = row["sample"] if type(row.get("sample")) is int and row["sample"] >= 0 else occurrence
            while (parent, sample) in used:  # the same number twice is still two answers
                sample += 1
            used.add((parent, sample))
            known |= earlier_measurements(row)
            if not strip_thoughts(known):
                known["response"] = ""  # as of our own sampler: a thought is no answer
        else:  # an equal query is another query
            sample, parent = 0, known.pop("id") or prompt_id(language, row["query"], occurrence)
        known["id"] = known.get("id") or record_id("evaluate", parent, sample)
        known |= {"parent_id": parent, "sample": sample, "attempt": 0, "language": language, "query": row["query"]}
        if known["id"] in ids:
            raise UserError(f"{where}: its id {known['id']!r} is also that of {ids[known['id']]}", "remove the `id`s")
        ids[known["id"]] = where.removeprefix(f"{path}, ")
        rows.append(new_record("output", **known))
    return rows


def checked_fields(row: dict, ready_made: bool, where: str) -> dict:
    """The text fields of a row that are kept, "" where it has none. UserError for a missing or wrong one."""
    if not ready_made and not isinstance(row.get("constraint"), str):
        raise UserError(f"{where}: no field 'constraint', a string is needed", '"" where no length is asked for')
    if ready_made and "response" not in row:  # "" is an answer, and scores 0
        raise UserError(f"{where}: no field 'response', a string is needed", "a benchmark is for --benchmark of answer")
    fields = ("id", "range", "type", "constraint", *(("parent_id", "response", "finish") if ready_made else ()))
    for field in fields:
        if not isinstance(row.get(field, ""), str):
            raise UserError(f"{where}: a {type(row[field]).__name__} in the field {field!r}, a string is needed")
    return {field: row.get(field, "") for field in fields}


def earlier_measurements(row: dict) -> dict:
    """What only the model that wrote or probed an answer could measure: kept where an earlier evaluation wrote it."""

    def number(value: object, kind: type | tuple[type, ...] = (int, float)) -> bool:
        return isinstance(value, kind) and not isinstance(value, bool) and 0 <= value < LARGEST  # type: ignore[operator]

    known: dict = {k: row[k] for k in ("response_tokens", "base_tokens") if number(row.get(k), int)}
    losses = ("perplexity", "own_loss", "shuffled_loss")
    known |= {k: float(row[k]) for k in losses if number(row.get(k))}
    by_position, tokens = row.get("base_losses"), known.pop("base_tokens", -1)
    if isinstance(by_position, list) and len(by_position) == sum(start < tokens for start in POSITIONS[:-1]):
        if all(number(loss) and loss < LARGEST_LOSS for loss in by_position):
            known |= {"base_tokens": tokens, "base_losses": by_position}
    return known


def read_demand(constraint: str, language: str, label: str, where: str) -> dict:
    """type, min_words and max_words of a constraint; `label` is the type that the file gives, "" for none."""
    try:
        type_, low, high = parse_demand(constraint, language)
    except ValueError:
        hint = 'write it as LonGen does: "around 3000 words", "2000-3000 words", "more than 4000 words", "小于五千字"'
        raise UserError(f"{where}: cannot read the constraint {constraint!r}", hint) from None
    if label not in ("", type_):
        raise UserError(
            f"{where}: type {label!r}, but the constraint {constraint!r} says {type_!r}", "correct or remove `type`"
        )
    return {"type": type_, "min_words": low, "max_words": high}


def select(rows: list[dict], language: str, limit: int, source: str) -> list[dict]:
    """The rows of a language, then the first `limit` of them (0 = all); says what it leaves out, and what is odd."""
    kept = filter_language(rows, language, source)
    if limit:  # the languages in turn, so that each is asked
        by_language: dict[str, list[dict]] = {}
        for row in kept:
            by_language.setdefault(row["language"], []).append(row)
        kept = [row for turn in zip_longest(*by_language.values()) for row in turn if row][:limit]
    if odd := contradictions(kept):  # said before hours of sampling
        cli.say(f"{len(odd)} queries do not state their demand; they are scored as labelled and listed in scores.json")
    return kept


def contradictions(rows: Sequence[dict]) -> list[dict]:
    """The queries that do not ask for what they are scored by: a number of the demand is not stated in them."""
    listed = []
    for row in {r["parent_id"]: r for r in rows if r["constraint"]}.values():
        stated = {n for demand in stated_demands(row["query"], row["language"]) for n in demand[1:]}
        if missing := {row["min_words"], row["max_words"]} - {-1} - stated:
            why = f"the query does not say {', '.join(map(str, sorted(missing)))}"
            fields = ("parent_id", "language", "range", "type", "constraint", "query")
            listed.append({"why": why, **{k: row[k] for k in fields}})
    return listed
