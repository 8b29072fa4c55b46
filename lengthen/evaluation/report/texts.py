"""The texts in the page: what is shown is text, each different one is packed once, and only as many as fit.

What a model wrote may hold markup, terminal escapes and marks that turn the direction of writing. Nothing reaches the
page except through `visible`, which spells such characters out.
"""

import base64
import json
import math
import random
import re
import zlib
from typing import Any

from lengthen.cli import ACTING
from lengthen.evaluation.report.rundir import Files, amount, display, text

MAX_BYTES = 14_000_000  # of texts and their rows in the page; the whole file stays below 15 MB
ANSWER_SHARE = 0.5  # answers to the benchmark may take so much of it, the samples of the stages the rest
BLOCK_CHARS = 200_000  # a block is opened at once: large enough to compress, small enough not to wait for
SLOTS = {  # kind: (title, field) of the texts that are shown beside each other
    "extension": (("Instruction", "prompt"), ("Draft", "initial"), ("Extension", "response")),
    "draft": (("Instruction", "prompt"), ("Draft", "response")),
    "demand": (("Instruction", "prompt"), ("With its demand", "query"), ("Answer", "response")),
}


def visible(text: str) -> str:
    """The text with every character spelled out that would act instead of being seen: ESC is ␛, U+202E is ⟨U+202E⟩."""

    def spell(match: re.Match) -> str:
        code = ord(match[0])
        return "␡" if code == 0x7F else chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"

    return ACTING.sub(spell, text.replace("\r\n", "\n"))


def as_shown(value: Any) -> Any:
    """Any JSON value with its strings made visible, and null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {visible(str(k)): as_shown(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_shown(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return visible(value) if isinstance(value, str) else value


# ---------------------------------------------------------------------------------------------------------
# Each text once, compressed


class Texts:
    """A pool of texts. `add` gives a text its number; `blocks` are JSON lists, deflated, in base64."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.blocks: list[str] = []
        self.starts: list[int] = []  # number of the first text of each block
        self.pending: list[str] = []
        self.pending_chars = self.rows = 0

    def add(self, value: Any) -> int:
        """The number of a text; -1 of an empty one."""
        shown = visible(text(value))
        if not shown:
            return -1
        if shown not in self.numbers:
            self.numbers[shown] = len(self.numbers)
            self.pending.append(shown)
            self.pending_chars += len(shown)
            if self.pending_chars >= BLOCK_CHARS:
                self.close()
        return self.numbers[shown]

    def close(self) -> None:
        """End the block that is being filled."""
        if self.pending:
            packed = zlib.compress(json.dumps(self.pending, ensure_ascii=False).encode(), 6)
            self.blocks.append(base64.b64encode(packed).decode())
            self.starts.append(len(self.numbers) - len(self.pending))
            self.pending, self.pending_chars = [], 0

    @property
    def bytes(self) -> int:
        """What the page holds so far; an open block is guessed at half its characters, 100 for a row of numbers."""
        return sum(map(len, self.blocks)) + self.pending_chars // 2 + 100 * self.rows


# ---------------------------------------------------------------------------------------------------------
# Answers and samples, as many as fit


def pack_answers(files: Files, models: list[dict], texts: Texts) -> dict:
    """Queries with the answers of all models, in a seeded order if not all of them fit."""
    by_query: dict[str, list[tuple[int, dict]]] = {}
    for index, model in enumerate(models):
        for answer in model["answers"]:
            by_query.setdefault(answer["parent"], []).append((index, answer))
    queries, order = {}, list(by_query)
    random.Random(0).shuffle(order)
    for query in order:
        if texts.bytes > ANSWER_SHARE * MAX_BYTES:
            break
        answers: list[list] = []
        first: dict = {}
        for index, answer in by_query[query]:
            record = files.line_at(answer["file"], answer["offset"])
            first = first or record
            sample, words = amount(record.get("sample")) or 0, answer["words"]
            score = amount(record.get("length_score"))
            finish = text(record.get("finish"))
            answers.append([index, sample, words, finish, score, texts.add(record.get("response"))])
        texts.rows += 1 + len(answers)
        constraint, language = text(first.get("constraint")), text(first.get("language"))
        queries[query] = [texts.add(first.get("query")), constraint, language, sorted(answers, key=lambda a: a[:2])]
    return {"queries": [queries[q] for q in by_query if q in queries], "total": len(by_query)}


def pack_samples(files: Files, rows: list[dict], texts: Texts) -> dict:
    """Rows [part, kind, outcome, finish, words, initial, rounds, texts]; a seeded choice of them if not all fit."""
    values = {"outcomes": [row["outcome"] for row in rows], "finishes": [row["finish"] for row in rows]}
    values |= {"parts": [display(row["part"]) for row in rows], "kinds": list(SLOTS)}
    lists = {name: list(dict.fromkeys(all_of)) for name, all_of in values.items()}
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    packed = {}
    for index in order:
        if texts.bytes > MAX_BYTES:
            break
        row = rows[index]
        record = files.line_at(row["file"], row["offset"])
        if row["kind"] == "extension" and not row["rounds"]:
            record["response"] = ""  # it is the draft once more
        numbers = [texts.add(record.get(field)) for _, field in SLOTS[row["kind"]]]
        texts.rows += 1
        packed[index] = [
            lists["parts"].index(display(row["part"])),
            lists["kinds"].index(row["kind"]),
            lists["outcomes"].index(row["outcome"]),
            lists["finishes"].index(row["finish"]),
            row["words"],
            row["initial"],
            row["rounds"],
            numbers,
        ]
    titles = {kind: [title for title, _ in slots] for kind, slots in SLOTS.items()}
    return {**lists, "titles": titles, "rows": [packed[p] for p in sorted(packed)], "total": len(rows)}
