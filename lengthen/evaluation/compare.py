"""Runs side by side: their scores, how each differs from the first, and the intervals of the differences."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from lengthen import cli
from lengthen.evaluation.growth import Change, change, difference, ratio
from lengthen.evaluation.measures import mean
from lengthen.evaluation.scores import HEADLINES, MEASURES, cell, headlines, measured, read_outputs, rounded, values_of
from lengthen.records import UserError


def read_scores(folder: str | Path) -> dict:
    """A run's scores.json; UserError where it is missing or damaged."""
    path = Path(folder) / "scores.json"
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", f"python evaluate.py … --output {folder}  writes it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}", "run the same evaluate.py command again") from None


def read_run(folder: str) -> dict:
    """A run's scores.json and, as "measured", what its answers give to each measure ([]: they are no longer there)."""
    path = Path(folder) / "outputs.jsonl"
    early = {"intervals": {}, "short_losses": [], "short_tasks": ""}  # what the first versions did not write
    return {**early, **read_scores(folder), "measured": measured(read_outputs(path))}


def changes(first: dict, run: dict) -> dict[str, Change]:
    """By measure, how the run differs from the first (words as a multiple of it), and the interval of that.

    The values are those of the two scores.json, so that they are known where the answers are no longer there.
    """
    same_tasks = first["short_losses"] and first["short_tasks"] == run["short_tasks"]
    return {key: change_of(key, first, run) for key in [*MEASURES, *(["short_loss"] if same_tasks else [])]}


def change_of(key: str, first: dict, run: dict) -> Change:
    """The same, of one measure."""
    if key == "short_loss":  # paired by task
        old, new = ({task: [loss] for task, loss in enumerate(r["short_losses"])} for r in (first, run))
        return change(old, new, mean, difference)
    how, same = ratio if key.startswith("words") else difference, first["queries_hash"] == run["queries_hash"]
    before, after = (values_of(key, r["measured"]) for r in (first, run))
    return change(before, after, MEASURES[key][1], how, same)._replace(value=how(first.get(key), run.get(key)))


def signed(key: str, form: str) -> str:
    """The format of a change in a measure: words as a multiple, the others with their sign."""
    return "x{:.2f}" if key.startswith("words") else form.replace("{:", "{:+").replace("++", "+")


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
            differs = changed.get(folder, {}).get(key)
            if differs and differs.value is not None:
                cells[-1] += "\n" + cell(differs.value, signed(key, form), differs.interval)
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
        "changes": {f: {key: rounded(c[:2]) for key, c in differs.items()} for f, differs in changed.items()},
        "paired": [folder for folder in changed if runs[folder]["queries_hash"] == first["queries_hash"]],
    }
