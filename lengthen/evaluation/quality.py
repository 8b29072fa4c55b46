"""Quality: the scores that judges give the answers of one run, length ignored; seven criteria, 1 to 10 each."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from lengthen import cli
from lengthen.evaluation.intervals import bootstrap, by_query
from lengthen.evaluation.judge import JudgeFlags, ask_judges, no_verdict, recorded
from lengthen.evaluation.measures import mean
from lengthen.evaluation.questions import CRITERIA, Question
from lengthen.evaluation.scores import cell, rounded
from lengthen.records import UserError, hash_of
from lengthen.stage import Stage


def judge_answers(folder: Path, outputs: Sequence[dict], judges: JudgeFlags, stage: Stage) -> list[UserError]:
    """Ask each judge for seven scores of each "output" record; what went wrong is returned."""
    items = []
    for row in outputs:
        fields = {k: row[k] for k in ("language", "sample")} | {"parent_id": row["id"]}
        fields["answer_hash"] = hash_of(row["query"], row["response"])
        key = f"{row['id']} {fields['answer_hash']}"
        items.append((fields, Question(key, "quality", row["language"], row["query"], (row["response"],))))
    problems = ask_judges(folder, judges, stage, items)
    for name, judgements in quality(folder, outputs, judges.judge).items():
        if name in judges.judge and not judgements["judged"] and not judgements["missing"]:
            problems.append(no_verdict(name, folder, judgements["failed"]))
    return problems


def quality(folder: Path, outputs: Sequence[dict], asked: Sequence[str] = ()) -> dict[str, dict]:
    """{judge: means of the seven scores, their mean and its interval, counts}, from the judgements of these answers.

    All judges of judgements.jsonl are there, and those of `asked`, even if they have said nothing yet.
    """
    hashes = {row["id"]: hash_of(row["query"], row["response"]) for row in outputs}
    latest: dict[str, dict[str, dict]] = {name: {} for name in asked}
    for record in recorded(folder):
        if hashes.get(record["parent_id"]) == record["answer_hash"]:  # else it is about an earlier text
            latest.setdefault(record["judge"], {})[record["parent_id"]] = record
    scores = {}
    for name, judgements in latest.items():
        good = {id_: r for id_, r in judgements.items() if "reason" not in r}
        # The answers to one query are resampled together.
        groups = by_query((row["parent_id"], good[row["id"]]["mean"]) for row in outputs if row["id"] in good)
        means = {key: mean([r[key] for r in good.values()]) for key in (*CRITERIA, "mean")}
        scores[name] = {
            **rounded({**means, "interval": bootstrap(groups, mean)}),
            "judged": len(good),
            "failed": len(judgements) - len(good),  # given up: no reply was in the required form
            "missing": len(outputs) - len(judgements),  # no reply yet
            "cut": sum(r["cut"] > 0 for r in good.values()),  # judged on texts that had to be cut
        }
    return scores


def show_quality(scores: dict[str, dict]) -> None:
    """One column per judge, on stderr."""
    if not scores:
        return
    table = Table(title="Quality, 1 to 10 (length ignored)")
    table.add_column("criterion")
    for name in scores:
        table.add_column(cli.shown(name), justify="right", overflow="fold")
    for key in (*CRITERIA, "mean"):
        intervals = [summary["interval"] if key == "mean" else None for summary in scores.values()]
        cells = [cell(summary[key], "{:.2f}", i) for summary, i in zip(scores.values(), intervals, strict=True)]
        table.add_row(key, *map(cli.shown, cells))
    for key in ("judged", "failed", "missing", "cut"):
        table.add_row(key, *(cell(summary[key]) for summary in scores.values()))
    cli.console.print(table)
