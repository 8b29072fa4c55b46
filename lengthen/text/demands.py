"""Length demands: reading them, making true ones, finding them in a query, and LonGen's length score.

A demand is `(type, min_words, max_words)`, the literal numbers: ("about", N, N), ("range", A, B), ("above", t, -1) or
("below", -1, t). The numbers come as digits, in words or as Chinese numerals. The words of each language, and what
stands around a number in it, are in its language.yaml.
"""

import random
import re
from functools import cache
from typing import NamedTuple

from lengthen.text.languages import NOTHING, TYPES, Demand, either, language

TYPE_WEIGHTS = (0.40, 0.25, 0.10, 0.25)
STEP_WEIGHTS = (0.8, 0.2)

# ---------------------------------------------------------------------------------------------------------------------
# Numbers

_DIGITS = {digit: value for value, digit in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}
_UNITS = {"十": 10, "百": 100, "千": 1000, "万": 10000}


def numeral(n: int) -> str:
    """Write 1..99,999,999 in Chinese numerals the way a writer would: 2500 -> 两千五百, 10050 -> 一万零五十."""
    assert 0 < n < 10**8, n
    if n >= 10_000:
        high, low = divmod(n, 10_000)
        head = "两" if high == 2 else numeral(high)
        gap = "零" if 0 < low < 1000 else ""
        return head + "万" + gap + (numeral(low) if low else "")
    text = ""
    for unit, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit, n = divmod(n, unit)
        if digit:
            text += ("两" if digit == 2 and unit == 1000 else "零一二三四五六七八九"[digit]) + name
        elif text and n and not text.endswith("零"):
            text += "零"
    return text.removeprefix("一") if text.startswith("一十") else text


def _read_numeral(text: str) -> int:
    if not set(text) & set("十百千万"):  # digit by digit: 二〇〇〇
        return int("".join(str(_DIGITS[char]) for char in text))
    total = section = digit = 0
    last_unit = 1
    for char in text:
        if char in _DIGITS:
            digit = _DIGITS[char]
            last_unit = 1 if digit == 0 else last_unit  # 一千零五 is 1,005
        elif char == "万":
            total, section, digit, last_unit = (total + section + digit) * 10_000, 0, 0, 10_000
        else:
            last_unit = _UNITS[char]
            section += (digit or 1) * last_unit
            digit = 0
    # A digit left at the end takes the next lower unit: 三千五 is 3,500.
    return total + section + digit * max(last_unit // 10, 1)


def read_number(text: str, code: str) -> int:
    """Read a number as a language writes it: "3,000", "3k", "2.5k", "three thousand", "三千五百", "3千", "３０００".

    Raises:
        ValueError: the text is no such number; it is named in the message.
    """
    return _grammar(language(code).demand).read(text)


# Full-width digits, letters and signs, and the many dashes, as their ASCII neighbours.
_NARROW = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | dict.fromkeys(map(ord, "‐‑‒–—―−～〜"), "-")


def _narrow(text: str) -> str:
    """One writing for what is read below: narrow, lower case."""
    return text.translate(_NARROW).replace("’", "'").lower()


# ---------------------------------------------------------------------------------------------------------------------
# Finding demands in a text: a number of words, the modifiers before it and the tail after it say the type


def _rows(table: tuple[tuple[str, str], ...]) -> str:
    return either(pattern for _, pattern in table)


class _Grammar:
    """The number words and patterns of a language, compiled; the unit is what makes a number a number of words."""

    def __init__(self, demand: Demand):
        modifier = f"(?<![a-z])(?:{_rows(demand.modifiers)})"  # "moreover 3,000 words" has no modifier "over"
        self.demand, self.names = demand, {**demand.values, **demand.multipliers}
        self.number = re.compile(rf"(?<![\da-z])(?<!\d[.,])(?P<number>{demand.number})(?P<unit>{demand.unit})?")
        self.unit_before = re.compile(demand.unit_before)
        self.join = re.compile(f"(?:{demand.unit})?{demand.join}")
        self.between, self.and_join = re.compile(demand.between), re.compile(f"(?:{demand.unit})?{demand.and_join}")
        self.modifier = re.compile(modifier)
        self.chain = re.compile(f"(?:{modifier}(?:{demand.fillers})*)+$")
        self.tail = re.compile(_rows(demand.tails))
        groups = f"[{re.escape(demand.thousands)}]" if demand.thousands else NOTHING
        scale = either(map(re.escape, demand.after_digits))
        self.digits = re.compile(rf"(\d+(?:{groups}\d{{3}})*)(?:{re.escape(demand.decimal)}(\d+))?\s*({scale})?")
        self.name = re.compile(either(sorted(map(re.escape, self.names), key=len, reverse=True)))
        self.joints = re.compile(rf"(?:[\s-]|{demand.joints})*")
        self.scale = re.compile(f"(?:{scale})$")

    def normalise(self, text: str) -> str:
        text = _narrow(text)
        for written, read in self.demand.rewrite.items():  # negations apart: "shouldn't" -> "should not"
            text = text.replace(written, read)
        return text

    def read(self, text: str) -> int:
        norm = self.normalise(text).strip()
        if match := self.digits.fullmatch(norm):
            whole, decimals = re.sub(r"\D", "", match[1]), match[2] or "0"
            return round(float(f"{whole}.{decimals}") * self.demand.after_digits.get(match[3], 1))
        if self.demand.numerals and re.fullmatch("[零〇一二两三四五六七八九十百千万]+", norm):
            return _read_numeral(norm)
        total = part = 0
        words = self.name.findall(norm)
        if not words or not self.joints.fullmatch(self.name.sub("", norm)):
            raise ValueError(f"not a number: {text!r}")
        for value in map(self.names.__getitem__, words):
            if value >= 1000:
                total, part = total + (part or 1) * value, 0
            elif value == 100:
                part = (part or 1) * value
            else:
                part += value
        return total + part

    def kinds(self, before: str, unit: str, after: str) -> list[str]:
        """The types that the words around a number ask for, from left to right."""
        chain = self.chain.search(before)
        found = [_kind(self.demand.modifiers, word) for word in self.modifier.findall(chain[0])] if chain else []
        if kind := next((kind for kind, pattern in self.demand.unit_kinds if re.search(pattern, unit)), ""):
            found.append(kind)
        elif tail := self.tail.match(after):
            found.append(_kind(self.demand.tails, tail[0]))
        return found


def _kind(table: tuple[tuple[str, str], ...], text: str) -> str:
    return next(kind for kind, pattern in table if re.match(pattern, text))


_grammar = cache(_Grammar)


class _Mention(NamedTuple):
    """A number in a text, or the two of a range."""

    start: int  # characters
    end: int
    low: int
    high: int
    counted: bool  # it is a number of words, not of chapters
    type: str


_LEAST_WORDS = 50  # "in two words" and "一个字" are no demands on the length of a text
_SENTENCE_END = re.compile(r"[.。;!?\n]")


def _type_of(kinds: list[str]) -> str:
    hard = [kind for kind in kinds if kind in ("above", "below")]
    if hard:
        return hard[0]
    return "below" if kinds and "about" not in kinds else "about"


def stated_demands(text: str, code: str, least: int = _LEAST_WORDS) -> list[tuple[str, int, int]]:
    """Every demand on a number of words that the text states, in order, each once.

    A bare number of words ("an 8,000-word summary") is "about". Numbers below `least` are not looked at.
    """
    grammar = _grammar(language(code).demand)
    text = grammar.normalise(text)
    mentions: list[_Mention] = []
    for match in grammar.number.finditer(text):
        start, end = match.span("number")
        before, unit = text[max(0, start - 60) : start], match["unit"] or ""
        try:
            value = grammar.read(match["number"])
        except ValueError:  # looks like number words, and is another word: "einsieben"
            continue
        counted = bool(unit or grammar.unit_before.search(before))
        kind = _type_of(grammar.kinds(before, unit, text[match.end() : match.end() + 40]))
        last = mentions[-1] if mentions else None
        if last and last.type != "range" and (counted or last.counted):
            gap, low = text[last.end : start], last.low
            if low < 100 and (scale := grammar.scale.search(match["number"])):  # "3-4k", "三到五千"
                low *= grammar.demand.after_digits[scale[0]]
            joined = grammar.join.fullmatch(gap) or (
                grammar.and_join.fullmatch(gap) and grammar.between.search(text[max(0, last.start - 60) : last.start])
            )
            bounded = last.type == "above" and kind == "below" and len(gap) <= 30 and not _SENTENCE_END.search(gap)
            if low < value and (joined or bounded):
                mentions[-1] = _Mention(last.start, end, low, value, True, "range")
                continue
        mentions.append(_Mention(start, end, value, value, counted, kind))
    demands = [
        (m.type, -1 if m.type == "below" else m.low, -1 if m.type == "above" else m.high)
        for m in mentions
        if m.counted and m.high >= least
    ]
    return list(dict.fromkeys(demands))


def states_demand(query: str, type: str, min_words: int, max_words: int, code: str) -> bool:
    """True when the query states this demand and no other one, in digits or in words."""
    return stated_demands(query, code) == [(type, min_words, max_words)]


def parse_demand(constraint: str, code: str) -> tuple[str, int, int]:
    """Read a `constraint` of LonGen's format ("around 3000 words", "三千字至四千字", …) as (type, min, max).

    Raises:
        ValueError: the string states no demand, or more than one; it is named in the message.
    """
    demands = stated_demands(constraint, code, least=1)
    if len(demands) != 1:
        raise ValueError(f"cannot read the length demand {constraint!r}")
    return demands[0]


# ---------------------------------------------------------------------------------------------------------------------
# Scoring and making demands


def full_marks(type: str, min_words: int, max_words: int) -> tuple[float, float]:
    """The interval of lengths that LonGen's score gives 1: about N [0.8 N, 1.2 N]; a range itself; above t [t, 1.5 t];
    below t [0.5 t, t]."""
    return {
        "about": (0.8 * min_words, 1.2 * min_words),
        "range": (min_words, max_words),
        "above": (min_words, 1.5 * min_words),
        "below": (0.5 * max_words, max_words),
    }[type]


def length_score(words: int, type: str, min_words: int, max_words: int) -> float:
    """LonGen's length score in [0, 1] of an answer of `words` words (by `longen_words` for the benchmark).

    1 within `full_marks` [a, b]; outside it the score falls linearly, to 0 at a / 2 and at 1.5 b.
    """
    a, b = full_marks(type, min_words, max_words)
    if words < a:
        return max(0.0, 2 * words / a - 1)
    if words > b:
        return max(0.0, 3 - 2 * words / b)
    return 1.0


def make_demand(
    words: int, code: str, rng: random.Random, *, low: int, high: int, steps: tuple[int, int]
) -> tuple[str, str, int, int] | None:
    """Draw a demand that an answer of `words` words meets: (constraint, type, min, max), or None outside [low, high).

    Method section 5: types 40/25/10/25 %, numbers are the length rounded to one of two steps (80/20 %), half of the
    Chinese ones in numerals. "Meets" is both literal and by `length_score`; a step too coarse for the length gives way
    to the other ("around 4000" for 3,000 words never appears), and a type no step can serve gives way to the rest.
    """
    if not low <= words < high:
        return None
    wording = language(code).demand
    types = rng.choices(TYPES, TYPE_WEIGHTS)
    first = rng.choices(steps, STEP_WEIGHTS)
    numerals = rng.random() < 0.5
    types += [type for type in TYPES if type not in types]
    sizes = first + [step for step in steps if step not in first]
    for type in types:
        for step in sizes:
            a, b = _rounded(words, type, step, low, high)
            if _is_true(words, type, a, b):
                write = numeral if wording.writes_numerals and numerals else str
                constraint = getattr(wording, type).format(a=write(max(a, 1)), b=write(max(b, 1)))
                return constraint, type, a, b
    return None


def _rounded(words: int, type: str, step: int, low: int, high: int) -> tuple[int, int]:
    """The length as the two numbers of a demand: nearest multiple of the step, or those strictly around it."""
    if type == "about":
        nearest = min(max((2 * words + step) // (2 * step) * step, low), high)
        return nearest, nearest
    floor = max((words - 1) // step * step, low)
    ceiling = min((words // step + 1) * step, high)
    if type == "range" and words % step == 0:  # one side is the length itself, the interval one step wide
        floor = max(words, low)
    return {"range": (floor, ceiling), "above": (floor, -1), "below": (-1, ceiling)}[type]


def _is_true(words: int, type: str, min_words: int, max_words: int) -> bool:
    literal = {
        "about": True,
        "range": min_words <= words <= max_words and min_words < max_words,
        "above": words > min_words,
        "below": words < max_words,
    }[type]
    return literal and length_score(words, type, min_words, max_words) == 1
