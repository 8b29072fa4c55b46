"""The files of a run, read as far as they can be: for whoever looks at a run and must not stumble over it.

A run in progress has files that are missing or end in half a line, and people edit files. Here nothing raises: what
cannot be read is left out and noted, a value of another type than it should have counts as missing. (The stages, which
build on what they read, use records.py, where every fault is an error.)
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# ---------------------------------------------------------------------------------------------------------
# Values


def number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15
    return value if good else None  # NaN compares as false


def amount(value: Any) -> float | None:
    """A number that cannot be below 0; -1 stands for "not known" in the records."""
    known = number(value)
    return known if known is not None and known >= 0 else None


def text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def table(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def listing(value: Any) -> list:
    return value if isinstance(value, list) else []


def counts(value: Any) -> dict[str, int]:
    """{reason: how often}, the most frequent first."""
    known = {str(k): int(n) for k, v in table(value).items() if (n := amount(v))}
    return dict(sorted(known.items(), key=lambda item: -item[1]))


def interval_of(scores: dict, key: str) -> list[float] | None:
    """[low, high] of a score, where scores.json has it."""
    ends = [end for x in listing(table(scores.get("intervals")).get(key)) if (end := number(x)) is not None]
    return sorted(ends) if len(ends) == 2 else None


def parsed(line: str | bytes) -> dict | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # ValueError: no JSON, no UTF-8
        return None
    return value if isinstance(value, dict) else None


class Files:
    """The files of a run. `notes` tells what could not be read."""

    def __init__(self, run: Path):
        self.run = run
        self.notes: list[str] = []

    def object(self, name: str) -> dict:
        """A JSON file, {} where there is none."""
        try:
            data = (self.run / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            self.notes.append(f"{name} cannot be read: {error.strerror}")
            return {}
        value = parsed(data)
        if value is None:
            self.notes.append(f"{name} is damaged or half-written; it is left out")
        return value or {}

    def lines(self, name: str) -> Iterator[tuple[int, dict]]:
        """(offset in the file, record) of each line that can be read; the others are counted."""
        offset = bad = 0
        try:
            with open(self.run / name, "rb") as handle:
                for line in handle:
                    if line.strip():
                        record = parsed(line)
                        bad += record is None
                        if record is not None:
                            yield offset, record
                    offset += len(line)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            self.notes.append(f"{name} cannot be read: {error.strerror}")
        if bad:
            lines = f"{bad} lines" if bad > 1 else "1 line"
            self.notes.append(f"{name}: {lines} damaged or half-written and left out")

    def line_at(self, name: str, offset: int) -> dict:
        """The record at an offset again; {} where the file was replaced in the meantime."""
        try:
            with open(self.run / name, "rb") as handle:
                handle.seek(offset)
                return parsed(handle.readline()) or {}
        except OSError:
            return {}

    def folders(self, *names: str) -> list[str]:
        """Folders of the run that are there; `names` may hold a pattern."""
        return sorted(str(p.relative_to(self.run)) for n in names for p in self.run.glob(n) if p.is_dir())

    def parts(self) -> list[str]:
        """The folders that stages write: the iterations in their order, the end, the controls."""
        iterations = sorted(self.folders("iter_*"), key=lambda part: (iteration(part), part))
        return [*iterations, *self.folders("final"), *self.folders("controls/*")]


def iteration(part: str) -> int:
    """3 of "iter_3" and "eval/iter_3", else 0."""
    match = re.fullmatch(r"(?:eval/)?iter_(\d{1,6})", part, re.ASCII)
    return int(match[1]) if match else 0


def display(part: str) -> str:
    """What people call "iter_2", "eval/iter_2", "control_told" and "controls/told"."""
    if iteration(part):
        return f"iteration {iteration(part)}"
    return re.sub("^controls/", "control ", part).replace("_", " ")
