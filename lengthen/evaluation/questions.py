"""What a judge is asked, and what is read from its reply. No model and no server here.

Scores are read from what a judge writes, not from the log-probabilities of the digits: those always give some number,
even when a model has no idea of the task, and a judge that cannot reply in the required form has to be seen to fail.
("10" is one token for one tokenizer and two for another, too.)
"""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from lengthen.models.chat import fill
from lengthen.records import hash_of
from lengthen.text.thoughts import without_thought

# The quality criteria of LonGen's evaluation, 1 to 10 each.
CRITERIA = ("relevance", "coherence", "accuracy", "consistency", "clarity", "creativity", "engagement")
WINNERS = ("first", "second", "tie")
SHORTEST = 200  # characters; texts are not cut below this length

# ---------------------------------------------------------------------------------------------------------
# Questions


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
        marks = (f"#{hash_of(number, *texts)[:8]}" for number in itertools.count())
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
    ended: bool = True  # not cut by the token limit, nor all thought
    error: str = ""  # the question can never be answered: it does not fit the judge's context, even cut
    num_tokens: int = 0  # not known


# ---------------------------------------------------------------------------------------------------------
# Verdicts

BRACE = re.compile(r"[{}]")
# Braces, but not those in strings. (A string has an end to look for: without one, every quote would look to the end.)
TOKEN = re.compile(r"""[{}]|"(?:[^"\\]|\\.){0,2000}"|(?<=[\s{,:])'(?:[^'\\\n]|\\.){0,2000}'(?=\s*[:,}])""", re.DOTALL)
TYPOGRAPHY = str.maketrans("“”‘’：，｛｝", "\"\"'':,{}")
# 8, 8.0, 8/10, "8 out of 10", "8分", "8: it is clear"; not 8/5, 8-9, 80%
NUMBER = re.compile(
    r"(\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*10(?:\.0+)?)?(?![a-z0-9%]|\.\d|\s*(?:[-–~/]|to|or|out of)\s*\d)",
    re.IGNORECASE,
)
SCORE = ("score", "rating", "value", "points")  # as a judge calls it beside its reason
WINNER = re.compile(r"(?:the )?(first|second|tie)(?: answer| one)?\.?", re.IGNORECASE)


def objects(text: str, token: re.Pattern[str]) -> Iterator[str]:
    """Every {...} in a text that holds no others, or only such, wherever it is. In linear time."""
    open_braces: list[list[int]] = []  # [where, levels inside it]
    position = 0
    while match := (token if open_braces else BRACE).search(text, position):
        position = match.end()
        if match[0] == "{":
            open_braces.append([match.start(), 0])
        elif match[0] == "}" and open_braces:
            start, levels = open_braces.pop()
            if open_braces:
                open_braces[-1][1] = max(open_braces[-1][1], levels + 1)
            if levels < 2:
                yield text[start:position]


def parsed(text: str) -> dict:
    """An object as JSON, else as the YAML that most of what is nearly JSON is ('8', 8/10, trailing commas), else {}.

    Its names in lower case.
    """
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        import yaml  # not for every verdict: it is slow

        text = re.sub(r"//[^\n\"']*$", "", text, flags=re.MULTILINE).expandtabs().replace("\\'", "''")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return {}
    return {str(name).lower().strip(" *_"): v for name, v in value.items()} if isinstance(value, dict) else {}


def read_verdict(question: Question, text: str, ended: bool = True) -> tuple[dict, str]:
    """(the verdict, "") or ({}, why there is none); `ended`: not cut by the token limit.

    Two different verdicts count as none: one of them may be quoted from the answer. So does a reply that repeats the
    fence: a weak judge copies the prompt, and with it what the answer says about itself.
    """
    # What a reasoning model considers first is not its verdict. A template may have begun the thought in the prompt.
    text, thought_ended = without_thought(text.rpartition("</think>")[2])
    if not (ended and thought_ended):
        return {}, "unfinished"
    if question.mark in text:
        return {}, "echo"
    read, word = (read_scores, "relevance") if question.template == "quality" else (read_winner, "winner")
    candidates: list[str] = []
    for form, token in ((text, TOKEN), (text.translate(TYPOGRAPHY), BRACE)):
        candidates = [candidate for candidate in objects(form, token) if ":" in candidate]
        verdicts = [v for c in candidates if word in c.lower() and (v := read(parsed(c)))]
        if verdicts:
            return (verdicts[0], "") if all(v == verdicts[0] for v in verdicts) else ({}, "several-verdicts")
    return {}, "out-of-form" if candidates else "no-json"


def read_scores(candidate: dict) -> dict:
    """The seven scores where all are there, each from 1 to 10 and rounded to a whole number, else {}."""
    found = {name: candidate.get(name, candidate.get(f"{name}_score")) for name in CRITERIA}
    scores = {name: read_number(value) for name, value in found.items()}
    return scores if all(1 <= score <= 10 for score in scores.values()) else {}


def read_number(value: object) -> int:
    """The whole number nearest to a score, alone or with its reason; 0 = none. (True is not a number.)"""
    if isinstance(value, dict):
        named = {str(name).lower(): inner for name, inner in value.items()}
        value = next((named[name] for name in SCORE if name in named), None)
    match = None if isinstance(value, bool) else NUMBER.match(str(value).strip())
    return int(float(match[1]) + 0.5) if match and 1 <= float(match[1]) <= 10 else 0


def read_winner(candidate: dict) -> dict:
    match = WINNER.fullmatch(str(candidate.get("winner")).strip())
    return {"winner": match[1].lower()} if match else {}


def schema(template: str) -> dict:
    """JSON schema of a verdict, for servers that hold their replies to one."""
    one: dict = {"type": "integer", "minimum": 1, "maximum": 10}
    properties = dict.fromkeys(CRITERIA, one) if template == "quality" else {"winner": {"enum": list(WINNERS)}}
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
