"""What a judge is asked, and what is read from its reply. No model and no server here.

Scores are read from what a judge writes, not from the log-probabilities of the digits: those always give some number,
even when a model has no idea of the task, and a judge that cannot reply in the required form has to be seen to fail.
("10" is one token for one tokenizer and two for another, too.)
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from lengthen.models.chat import fill

# The quality criteria of LonGen's evaluation, 1 to 10 each.
CRITERIA = ("relevance", "coherence", "accuracy", "consistency", "clarity", "creativity", "engagement")
WINNERS = ("first", "second", "tie")

# ---------------------------------------------------------------------------------------------------------
# Questions


def hash_of(*texts: str) -> str:
    """16 hex digits that are the same for the same texts."""
    return hashlib.sha256("\x1f".join(texts).encode("utf-8", "replace")).hexdigest()[:16]


def cut_middle(text: str, limit: int) -> str:
    """At most `limit` characters of the text, its beginning and its end, and a line that says so."""
    if len(text) <= limit:
        return text
    head = limit // 2
    note = f"[… {len(text) - limit} characters are left out here, for the judge only …]"
    return f"{text[:head]}\n{note}\n{text[len(text) - limit + head :]}"


@dataclass(frozen=True)
class Question:
    """One thing to be judged: one answer, or two in the order in which the judge sees them."""

    id: str
    template: str  # of prompts/: "quality" or "compare"
    language: str
    query: str
    answers: tuple[str, ...]

    @cached_property
    def mark(self) -> str:
        """What fences the texts off: it occurs in none of them, cut or whole, and is the same for either order."""
        texts = sorted((self.query, *self.answers))
        marks = (f"#{hash_of(str(number), *texts)[:8]}" for number in itertools.count())
        return next(mark for mark in marks if not any(mark in text for text in texts))

    def longest(self) -> int:
        return max(map(len, (self.query, *self.answers)))

    def prompt(self, limit: int) -> tuple[str, int]:
        """The prompt with each text cut to `limit` characters, and how many characters were left out."""
        whole = (self.query, *self.answers)
        texts = [cut_middle(text, limit) for text in whole]
        names = ("query", "answer") if self.template == "quality" else ("query", "first", "second")
        fields = dict(zip(names, texts, strict=True))
        cut = sum(max(0, len(text) - limit) for text in whole)
        return fill(self.template, self.language, mark=self.mark, **fields), cut


@dataclass(frozen=True)
class JudgeRequest:
    """A question on its way to a judge."""

    key: tuple[str, tuple[int, ...]]  # (id of the judgement, draw), see lengthen.tasks
    question: Question
    seed: int
    temperature: float  # 0 = greedy


@dataclass
class JudgeReply:
    """What came back: a text, or why there is none."""

    request: JudgeRequest
    text: str = ""
    cut: int = 0  # characters left out of the prompt's texts
    missing: str = ""  # the judge could not be reached, for this reason: to be asked again another time
    error: str = ""  # the question can never be answered: it does not fit the judge's context, even cut
    num_tokens: int = 0  # not known


# ---------------------------------------------------------------------------------------------------------
# Verdicts


def objects(text: str) -> Iterator[dict]:
    """The JSON objects in a text, wherever they are: after prose, in code fences, inside one another."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            value, _ = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        yield value


def read_verdict(question: Question, text: str) -> tuple[dict, str]:
    """(the verdict, "") or ({}, why there is none).

    Two different verdicts count as none: one of them may be quoted from the answer. So does a reply that repeats the
    fence: a weak judge copies the prompt, and with it what the answer says about itself.
    """
    text = text.rpartition("</think>")[2]  # what a reasoning model considers first is not its verdict
    if question.mark in text:
        return {}, "echo"
    read = read_scores if question.template == "quality" else read_winner
    candidates = list(objects(text))
    verdicts = [verdict for verdict in map(read, candidates) if verdict]
    if not verdicts:
        return {}, "out-of-form" if candidates else "no-json"
    return (verdicts[0], "") if all(v == verdicts[0] for v in verdicts) else ({}, "several-verdicts")


def read_scores(candidate: dict) -> dict:
    """The seven scores where all are there and whole numbers from 1 to 10, else {}. (True is not a number.)"""
    scores = {name: candidate.get(name) for name in CRITERIA}
    return scores if all(type(v) is int and 1 <= v <= 10 for v in scores.values()) else {}


def read_winner(candidate: dict) -> dict:
    return {"winner": candidate["winner"]} if candidate.get("winner") in WINNERS else {}
