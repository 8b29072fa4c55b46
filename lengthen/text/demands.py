"""Length demands: reading them, making true ones, finding them in a query, and LonGen's length score.

A demand is `(type, min_words, max_words)`, the literal numbers: ("about", N, N), ("range", A, B), ("above", t, -1) or
("below", -1, t). The numbers come as digits, as English words or as Chinese numerals. Standard library only.
"""

import random
import re
from typing import NamedTuple

TYPES = ("about", "range", "above", "below")
TYPE_WEIGHTS = (0.40, 0.25, 0.10, 0.25)

# One table for making demands: a type cannot get the words of another (in the release a list out of step did that to
# a third of the Chinese demands). The wording is LonGen's own.
WORDING = {
    "en": {
        "about": "around {a} words",
        "range": "{a}-{b} words",
        "above": "more than {a} words",
        "below": "less than {b} words",
    },
    "zh": {"about": "大约{a}字", "range": "{a}字至{b}字", "above": "大于{a}字", "below": "小于{b}字"},
}

# ---------------------------------------------------------------------------------------------------------------------
# Numbers

_ZH_DIGITS = {digit: value for value, digit in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}
_ZH_UNITS = {"十": 10, "百": 100, "千": 1000, "万": 10000}
_EN_NUMBERS = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen".split()
    )
} | {word: 10 * value for value, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_EN_UNITS = {"hundred": 100, "thousand": 1000}


def chinese_number(n: int) -> str:
    """Write 1..99,999,999 as a Chinese numeral the way a writer would: 2500 -> 两千五百, 10050 -> 一万零五十."""
    assert 0 < n < 10**8, n
    if n >= 10_000:
        high, low = divmod(n, 10_000)
        head = "两" if high == 2 else chinese_number(high)
        gap = "零" if 0 < low < 1000 else ""
        return head + "万" + gap + (chinese_number(low) if low else "")
    text = ""
    for unit, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit, n = divmod(n, unit)
        if digit:
            text += ("两" if digit == 2 and unit == 1000 else "零一二三四五六七八九"[digit]) + name
        elif text and n and not text.endswith("零"):
            text += "零"
    return text.removeprefix("一") if text.startswith("一十") else text


def _read_chinese(text: str) -> int:
    if not set(text) & set("十百千万"):  # digit by digit: 二〇〇〇
        return int("".join(str(_ZH_DIGITS[char]) for char in text))
    total = section = digit = 0
    last_unit = 1
    for char in text:
        if char in _ZH_DIGITS:
            digit = _ZH_DIGITS[char]
            last_unit = 1 if digit == 0 else last_unit  # 一千零五 is 1,005
        elif char == "万":
            total, section, digit, last_unit = (total + section + digit) * 10_000, 0, 0, 10_000
        else:
            last_unit = _ZH_UNITS[char]
            section += (digit or 1) * last_unit
            digit = 0
    # A digit left at the end takes the next lower unit: 三千五 is 3,500.
    return total + section + digit * max(last_unit // 10, 1)


def _read_english(text: str) -> int:
    total = part = 0
    for word in re.split(r"[\s-]+(?:and[\s-]+)?", re.sub(r"^an?\s+", "", text)):
        if word == "thousand":
            total, part = total + (part or 1) * 1000, 0
        elif word == "hundred":
            part = (part or 1) * 100
        else:
            part += _EN_NUMBERS[word]
    return total + part


def read_number(text: str) -> int:
    """Read "3,000", "3k", "2.5k", "three thousand", "三千五百", "两千", "3千", "1.5万", "３０００".

    Raises:
        ValueError: the text is no such number; it is named in the message.
    """
    norm = _normalise(text).strip()
    if match := re.fullmatch(r"(\d+(?:,\d{3})*(?:\.\d+)?)\s*(k|千|万|thousand)?", norm):
        scale = {"k": 1000, "thousand": 1000, "千": 1000, "万": 10_000}.get(match[2], 1)
        return round(float(match[1].replace(",", "")) * scale)
    try:
        if re.fullmatch("[零〇一二两三四五六七八九十百千万]+", norm):
            return _read_chinese(norm)
        return _read_english(norm)
    except (KeyError, ValueError):
        raise ValueError(f"not a number: {text!r}") from None


# Full-width digits, letters and signs, and the many dashes, as their ASCII neighbours.
_NARROW = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | dict.fromkeys(map(ord, "‐‑‒–—―−～〜"), "-")


def _normalise(text: str) -> str:
    """One writing for what is read below: narrow, lower case, negations apart ("shouldn't" -> "should not")."""
    text = text.translate(_NARROW).replace("’", "'").lower()
    return text.replace("n't", " not").replace("cannot", "can not")


# ---------------------------------------------------------------------------------------------------------------------
# Finding demands in a text: a number of words, the modifiers before it and the tail after it say the type

_EN_NAMES = "|".join([*_EN_NUMBERS, *_EN_UNITS])
_EN_NUMBER = (
    r"\d{1,9}(?:,\d{3}){0,2}(?:\.\d{1,3})?(?:\s?k\b|\s?thousand\b)?"
    # "three thousand and fifty" is one number, "two thousand and three thousand" are two.
    rf"|\b(?:{_EN_NAMES})\b(?:[\s-]+(?:{_EN_NAMES})\b|\s+and\s+(?:{_EN_NAMES})\b(?![\s-]+(?:hundred|thousand)))*"
)
_ZH_NUMBER = (
    r"\d{1,9}(?:,\d{3}){0,2}(?:\.\d{1,3})?\s?[千万k]?|[一二两三四五六七八九十][零〇一二两三四五六七八九十百千万]{0,12}"
)

# Rows are tried in order and negated comparisons come first: "no less than" is not "less than". A "soft below" word
# sets a limit, unless the number itself is called approximate ("within about 3,000 words" is about 3,000).
_NOT = r"(?:no|not|never|without)\s+(?:(?:to|be|go|going|get|make|write|use|have|contain|let|it|any|much|far)\s+)*"
_EN_MODIFIERS = (
    ("above", rf"{_NOT}(?:(?:less|fewer|shorter|lower|smaller)\s+than|under|below)"),
    ("below", rf"{_NOT}(?:(?:more|longer|greater|higher|larger)\s+than|over|above|beyond|past|exceed\w*|surpass\w*)"),
    ("above", r"(?:more|longer|greater|higher|larger)\s+than|over|above|beyond|exceed(?:s|ing)?|surpass(?:es|ing)?"),
    ("above", r"in\s+excess\s+of|upwards?\s+of|at\s+(?:the\s+very\s+)?least|minimum|min\.?|>=?|≥"),
    ("below", r"(?:less|fewer|shorter|lower|smaller)\s+than|under|below|at\s+(?:the\s+very\s+)?most|up\s+to|shy\s+of"),
    ("below", r"maximum|max\.?|<=?|≤|capped\s+at"),
    ("soft below", r"within|inside|limit(?:ed|ing)?(?:\s+(?:\w+\s+){0,4}?to)?"),
    ("about", r"around|about|approximately|approx\.?|roughly|circa|nearly|almost|close\s+to|some|~|≈"),
)
_EN_FILLERS = r"[\s:(]|of\b|a\b|the\b|total\b|length\b|is\b|be\b|to\b|at\b|words?\b|count\b|-"
_EN_TAILS = (
    ("above", r",?\s*or\s+(?:more|longer|above|over)\b|\s*\+|\s+and\s+(?:above|up)\b"),
    ("below", r",?\s*or\s+(?:less|fewer|shorter|under|below)\b|[\s-]+limit\b"),
    ("about", r",?\s*or\s+(?:so|thereabouts)\b|,?\s*give\s+or\s+take\b"),
    # "3,000 words at least", but not "3,000 words, at least five examples"
    ("above", r"[\s,(-]+(?:minimum|min|at\s+(?:the\s+very\s+)?least)\b(?!\s+(?:of\s+)?[\w\"'])"),
    ("below", r"[\s,(-]+(?:maximum|max|tops|at\s+(?:the\s+very\s+)?most)\b(?!\s+(?:of\s+)?[\w\"'])"),
)
_ZH_NOT = r"[不勿未](?:得|能|可以|可|应该|应|要|宜|会|必|许|准|允许)?(?:再)?(?:写)?"
_ZH_MODIFIERS = (
    ("above", rf"{_ZH_NOT}(?:少于|低于|小于|短于|少过|下于)"),
    ("below", rf"{_ZH_NOT}(?:超过|超出|多于|大于|高于|长于|多过|逾)"),
    ("above", r"至少|最少|最低|起码|超过|超出|多于|大于|高于|长于|多过|逾|下限|>=?|≥"),
    ("below", r"至多|最多|最高|顶多|小于|少于|低于|短于|少过|不到|不足|不满|上限|<=?|≤"),
    ("about", r"大约|大概|大致|约|差不多|将近|接近|近"),
)
_ZH_FILLERS = r"[\s:(为在于到是达需要有写的了]|控制|限制|限定|保持|总计|共|字数|篇幅"
_ZH_TAILS = (
    ("above", r"\s*(?:\+|(?:及|或)?以上|之上|往上|打底|起步|起(?=[\s,。.;!?、)]|$))"),
    ("below", r"\s*(?:及|或)?(?:以下|之下)"),
    ("soft below", r"\s*(?:之?间?以内|之内|内(?!容|心|部|涵)|为限|为上限|封顶|的?上限)"),
    ("about", r"\s*(?:左右|上下|前后|来)"),
)


def _rows(table: tuple[tuple[str, str], ...]) -> str:
    return "|".join(pattern for _, pattern in table)


class _Grammar:
    """The patterns of one language, compiled once; `unit` is what makes a number a number of words."""

    def __init__(self, number, unit, unit_before, join, between, and_join, modifiers, fillers, tails):
        modifier = f"(?<![a-z])(?:{_rows(modifiers)})"  # "moreover 3,000 words" has no modifier "over"
        self.modifiers, self.tails = modifiers, tails
        self.number = re.compile(rf"(?<![\da-z])(?<!\d[.,])(?P<number>{number})(?P<unit>{unit})?")
        self.unit_before = re.compile(unit_before)
        self.join = re.compile(f"(?:{unit})?{join}")
        self.between, self.and_join = re.compile(between), re.compile(f"(?:{unit})?{and_join}")
        self.modifier = re.compile(modifier)
        self.chain = re.compile(f"(?:{modifier}(?:{fillers})*)+$")
        self.tail = re.compile(_rows(tails))

    def kinds(self, before: str, unit: str, after: str) -> list[str]:
        """The types that the words around a number ask for, from left to right."""
        chain = self.chain.search(before)
        found = [_kind(self.modifiers, word) for word in self.modifier.findall(chain[0])] if chain else []
        if re.search(r"\+|plus|or\s+more|[多余]", unit):
            found.append("above")
        elif re.search(r"or\s+(?:fewer|less)", unit):
            found.append("below")
        elif tail := self.tail.match(after):
            found.append(_kind(self.tails, tail[0]))
        return found


def _kind(table: tuple[tuple[str, str], ...], text: str) -> str:
    return next(kind for kind, pattern in table if re.match(pattern, text))


_GRAMMARS = {
    "en": _Grammar(
        number=_EN_NUMBER,
        unit=r"[\s-]*(?:\+|plus\b|or\s+(?:more|fewer|less|so)\b)?[\s-]*(?:(?:english|total|written)\s+)?words?\b",
        unit_before=r"\bword[\s-]?(?:count|limit|length|target|total|range)\b[^.,;!?\n\d]{0,30}$",
        join=r"\s*(?:-|\bto\b|\bthrough\b)\s*",
        between=r"\bbetween\b[^.;!?\n\d]{0,20}$",
        and_join=r"\s*\band\b\s*",
        modifiers=_EN_MODIFIERS,
        fillers=_EN_FILLERS,
        tails=_EN_TAILS,
    ),
    "zh": _Grammar(
        number=_ZH_NUMBER,
        unit=r"\s*[多余来]?\s*个?(?:英文)?(?:汉字|单词|字(?![节体段母典幕])|词(?![汇语典组])|words?\b)",
        unit_before=r"(?:字数|篇幅|长度)[^。,;!?\n\d]{0,10}$",
        join=r"\s*(?:-+|至|到)\s*",
        between=r"(?:在|介于)[^。;!?\n\d]{0,8}$",
        and_join=r"\s*[和与、]\s*",
        modifiers=_ZH_MODIFIERS,
        fillers=_ZH_FILLERS,
        tails=_ZH_TAILS,
    ),
}


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


def stated_demands(text: str, language: str, least: int = _LEAST_WORDS) -> list[tuple[str, int, int]]:
    """Every demand on a number of words that the text states, in order, each once.

    A bare number of words ("an 8,000-word summary") is "about". Numbers below `least` are not looked at.
    """
    grammar, text = _GRAMMARS[language], _normalise(text)
    mentions: list[_Mention] = []
    for match in grammar.number.finditer(text):
        start, end = match.span("number")
        before, unit = text[max(0, start - 60) : start], match["unit"] or ""
        value, counted = read_number(match["number"]), bool(unit or grammar.unit_before.search(before))
        kind = _type_of(grammar.kinds(before, unit, text[match.end() : match.end() + 40]))
        last = mentions[-1] if mentions else None
        if last and last.type != "range" and (counted or last.counted):
            gap, low = text[last.end : start], last.low
            if low < 100 and (scale := re.search("k$|thousand$|千$|万$", match["number"])):  # "3-4k", "三到五千"
                low *= 10_000 if scale[0] == "万" else 1000
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


def states_demand(query: str, type: str, min_words: int, max_words: int, language: str) -> bool:
    """True when the query states this demand and no other one, in digits, number words or Chinese numerals."""
    return stated_demands(query, language) == [(type, min_words, max_words)]


def parse_demand(constraint: str, language: str) -> tuple[str, int, int]:
    """Read a `constraint` of LonGen's format ("around 3000 words", "三千字至四千字", …) as (type, min, max).

    Raises:
        ValueError: the string states no demand, or more than one; it is named in the message.
    """
    demands = stated_demands(constraint, language, least=1)
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
    words: int,
    language: str,
    rng: random.Random,
    *,
    low: int,
    high: int,
    steps: tuple[int, ...] = (1000, 2000),
    step_weights: tuple[float, ...] = (0.8, 0.2),
) -> tuple[str, str, int, int] | None:
    """Draw a demand that an answer of `words` words meets: (constraint, type, min, max), or None outside [low, high).

    Method section 5: types 40/25/10/25 %, numbers are the length rounded to a step drawn from `steps`, half of the
    Chinese ones as numerals. "Meets" is both literal and by `length_score`; a step too coarse for the length gives way
    to the others ("around 4000" for 3,000 words never appears), and a type no step can serve gives way to the rest.
    """
    if not low <= words < high:
        return None
    types = rng.choices(TYPES, TYPE_WEIGHTS)
    first = rng.choices(steps, step_weights)
    numerals = rng.random() < 0.5
    types += [type for type in TYPES if type not in types]
    sizes = first + [step for step in steps if step not in first]
    for type in types:
        for step in sizes:
            a, b = _rounded(words, type, step, low, high)
            if _is_true(words, type, a, b):
                write = chinese_number if language == "zh" and numerals else str
                constraint = WORDING[language][type].format(a=write(max(a, 1)), b=write(max(b, 1)))
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
