"""Runs side by side: their scores, how each differs from the first, and the intervals of the differences."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from lengthen import cli
from lengthen.evaluation import intervals
from lengthen.evaluation.measures import mean
from lengthen.evaluation.scores import HEADLINES, MEASURES, by_query, cell, complete, headlines, measured, rounded
from lengthen.records import UserError, numbered_lines


def read_run(folder: str) -> dict:
    """A run's scores.json and, as "measured", what its answers give to each measure ([]: they are no longer there)."""
    path = Path(folder) / "scores.json"
    try:
        scores = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", f"python evaluate.py … --output {folder}  writes it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}", "run the same evaluate.py command again") from None
    answers = Path(folder) / "outputs.jsonl"
    rows = [complete(row) for _, row in numbered_lines(answers)] if answers.exists() else []
    rows.sort(key=lambda row: row["parent_id"])  # as the report: an interval must not depend on who finished first
    return {"intervals": {}, "short_losses": [], "short_tasks": "", **scores, "measured": measured(rows)}


def times(a: float | None, b: float | None) -> float | None:
    return b / a if a and b is not None else None


def more(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else b - a


def changes(first: dict, run: dict) -> dict[str, tuple[float | None, intervals.Interval | None]]:
    """By measure, how the run differs from the first (words as a multiple of it), and the interval of that."""
    same = first["queries_hash"] == run["queries_hash"]
    draw = intervals.paired if same else intervals.unpaired
    queries = list(dict.fromkeys(answer["query"] for one in (first, run) for answer in one["measured"]))
    found = {}
    for key, (_, total) in MEASURES.items():
        differ = times if key.startswith("words") else more
        groups = (by_query(key, one["measured"], queries) for one in (first, run))
        found[key] = (
            differ(first.get(key), run.get(key)),
            draw(*groups, lambda a, b, total=total, differ=differ: differ(total(a), total(b))),
        )
    if first["short_losses"] and first["short_tasks"] == run["short_tasks"]:  # paired by task
        losses = ([[loss] for loss in one["short_losses"]] for one in (first, run))
        difference = intervals.paired(*losses, lambda a, b: mean(b) - mean(a))
        found["short_loss"] = more(first["short_loss"], run["short_loss"]), difference
    return found


def compare(folders: Sequence[str]) -> dict:
    """One table of the scores of several runs, and how each differs from the first, all with their intervals."""
    runs = {folder: read_run(folder) for folder in dict.fromkeys(str(Path(f)) for f in folders)}
    first = next(iter(runs.values()))
    changed = {folder: changes(first, run) for folder, run in runs.items() if run is not first}
    table = Table(title="Scores side by side; 95 % intervals over queries")
    table.add_column("measure")
    for folder in runs:
        table.add_column(cli.shown(folder), justify="right", overflow="fold")
    for key, name, form in HEADLINES:
        cells = []
        for folder, run in runs.items():
            cells.append(cell(headlines(run).get(key), form, run["intervals"].get(key)))
            value, interval = changed.get(folder, {}).get(key, (None, None))
            if value is not None:
                signed = "x{:.2f}" if key.startswith("words") else form.replace("{:", "{:+").replace("++", "+")
                cells[-1] += "\n" + cell(value, signed, interval)
        table.add_row(name, *cells)
    cli.console.print(table)
    for key, what in (("queries_hash", "other queries"), ("sampling", "other sampling settings")):
        if others := [f for f, run in runs.items() if run[key] != first[key]]:
            how = "; intervals of their differences are not paired" if key == "queries_hash" else ""
            cli.say(f"not like for like: {', '.join(others)} with {what} than {next(iter(runs))}{how}")
    keys = [key for key, _, _ in HEADLINES]
    return {
        "stage": "compare",
        "runs": {folder: {key: headlines(run).get(key) for key in keys} for folder, run in runs.items()},
        "changes": rounded(changed),
        "paired": [folder for folder in changed if runs[folder]["queries_hash"] == first["queries_hash"]],
    }
