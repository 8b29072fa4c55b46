"""A language is a folder of prompts/, named by its code: templates, seeds, queries, and language.yaml.

language.yaml holds all that the code has to know of a language: its names, number words, length demands, chatter,
endings. It is read once, when a text of the language is, and checked whole: what is wrong is one line with file and
key. docs/languages.md says what each key means and how to add a language. No other module names one.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from lengthen.errors import UserError

PROMPTS = Path(__file__).parents[2] / "prompts"
PAGE = "docs/languages.md says what each key means"
DEFAULT = "both"  # --language: the group of the paper's two
DEMO = "demo"  # that of run.py's presets. Either is all languages where none is in it.
NOTHING = "(?!)"  # a regular expression that matches nothing
TYPES = ("about", "range", "above", "below")  # of length demands

# ---------------------------------------------------------------------------------------------------------------------
# Kinds of values: each reads what YAML gives into what the code takes, or raises ValueError


def text(value: Any, macros: Mapping[str, str]) -> str:
    """A text as it is."""
    if not isinstance(value, str):  # YAML reads a bare Yes, No or 3 as something else
        raise ValueError(f"{value!r} is not a text: put it in quotes")
    return value


def number(value: Any, macros: Mapping[str, str]) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{value!r} is not a whole number of 1 or more")
    return value


def switch(value: Any, macros: Mapping[str, str]) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def words(value: Any, macros: Mapping[str, str]) -> tuple[str, ...]:
    """A text of words between blanks."""
    return tuple(text(value, macros).split())


def pattern(value: Any, macros: Mapping[str, str]) -> str:
    """A regular expression; its macros (names in capitals) stand for other ones."""
    regex = text(value, macros)
    for name in sorted(macros, key=len, reverse=True):  # REWORKED before WORK
        regex = regex.replace(name, macros[name])
    try:
        re.compile(regex, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error}): {regex[:80]}") from None
    return regex


def lines(value: Any, macros: Mapping[str, str]) -> tuple[str, ...]:
    """A text with a regular expression per line."""
    return tuple(pattern(line, macros) for line in text(value, macros).split("\n") if line)


def texts(value: Any, macros: Mapping[str, str]) -> dict[str, str]:
    """{text: text}"""
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not a mapping")
    return {text(key, macros): text(item, macros) for key, item in value.items()}


def numbers(value: Any, macros: Mapping[str, str]) -> dict[str, int]:
    """{word: whole number}"""
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not a mapping of words to numbers")
    return {text(key, macros): item if item == 0 else number(item, macros) for key, item in value.items()}


def rows(value: Any, macros: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """A list of `type of demand: regular expression`, tried in order."""
    found = []
    for row in value if isinstance(value, list) else [value]:
        if not isinstance(row, dict) or len(row) != 1 or (kind := next(iter(row))) not in (*TYPES, "soft below"):
            raise ValueError(f"{row!r} is not one of {', '.join(TYPES)}, soft below with a regular expression")
        found.append((kind, pattern(row[kind], macros)))
    return tuple(found)


def filled_with(*names: str) -> Callable[[Any, Mapping[str, str]], str]:
    """A text that holds exactly these fields in braces."""

    def template(value: Any, macros: Mapping[str, str]) -> str:
        there = re.findall(r"\{(.*?)\}", text(value, macros))
        if sorted(there) != sorted(names):
            raise ValueError(f"{value!r} must have the fields {', '.join(f'{{{name}}}' for name in names)}")
        return value

    return template


def key(read: Callable[[Any, Mapping[str, str]], Any], default: Any = MISSING) -> Any:
    """A key of language.yaml: how its value is read; without a default it must be there."""
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"read": read})
    return field(default=default, metadata={"read": read})


def either(patterns: Iterable[str]) -> str:
    """One regular expression for several; of none, one that matches nothing."""
    return "|".join(patterns) or NOTHING


# ---------------------------------------------------------------------------------------------------------------------
# The file. A class is a section.


@dataclass(frozen=True, eq=False, kw_only=True)
class Demand:
    """Length demands: how they are worded, and how those in a text are found (demands.py)."""

    about: str = key(filled_with("a"))
    range: str = key(filled_with("a", "b"))
    above: str = key(filled_with("a"))
    below: str = key(filled_with("b"))
    sentence: str = key(filled_with("prompt", "constraint"))  # a prompt with a demand in a sentence of its own
    at_least: str = key(filled_with("words"))  # what evaluate.py --at-least appends
    # How numbers are written: in digits, and in words that add up (NAMES in `number` stands for all of them).
    thousands: str = key(text)  # the signs between groups of three digits
    decimal: str = key(text)
    after_digits: dict[str, int] = key(numbers, {})  # "3k"
    values: dict[str, int] = key(numbers, {})
    multipliers: dict[str, int] = key(numbers, {})
    joints: str = key(pattern, NOTHING)  # what may stand between number words beside blanks and hyphens
    numerals: bool = key(switch, False)  # read 三千五百
    writes_numerals: bool = key(switch, False)  # and write half of the demands so
    number: str = key(pattern)
    # What stands around a number. The unit makes it a number of words, modifiers and tails give the type.
    rewrite: dict[str, str] = key(texts, {})  # first of all, in the lower-cased text
    unit: str = key(pattern)
    unit_kinds: tuple[tuple[str, str], ...] = key(rows, ())
    unit_before: str = key(pattern, NOTHING)
    join: str = key(pattern)  # of the two numbers of a range
    between: str = key(pattern, NOTHING)  # before a range of two numbers that are joined by ...
    and_join: str = key(pattern, NOTHING)
    modifiers: tuple[tuple[str, str], ...] = key(rows)
    fillers: str = key(pattern, r"[\s:(-]")  # between a modifier and its number
    tails: tuple[tuple[str, str], ...] = key(rows, ())


@dataclass(frozen=True, eq=False, kw_only=True)
class Chatter:
    """What models say about an answer, a phrase per line (filters.py says what else than regular expressions)."""

    short: dict[str, str] = key(texts, {})  # "is": "'s"
    openings: tuple[str, ...] = key(lines, ())
    closings: tuple[str, ...] = key(lines, ())
    inside: tuple[str, ...] = key(lines, ())  # of a text: the beginning of a second answer
    refusals: tuple[str, ...] = key(lines, ())  # how one of the first three sentences begins
    itself: tuple[str, ...] = key(lines, ())  # anywhere in a text, as regular expressions
    labels: tuple[str, ...] = key(words, ())  # before an instruction: "Task 3: ..."
    answers: tuple[str, ...] = key(words, ())  # before an answer to one: "Response: ..."


@dataclass(frozen=True, eq=False, kw_only=True)
class Endings:
    """How texts end, and how they are cut (filters.py)."""

    joining: tuple[str, ...] = key(words, ())  # no sentence ends in these
    abbreviations: tuple[str, ...] = key(words, ())  # nor in these with a full stop
    closers: str = key(text, "")  # closing quotes and blanks before them beside those of English
    last_lines: tuple[str, ...] = key(lines, ())  # whole last lines without a full stop
    farewells: tuple[str, ...] = key(lines, ())  # how the lines begin above a signature


@dataclass(frozen=True, eq=False, kw_only=True)
class Detection:
    """A rule that decides before the library does (words.py)."""

    script: str = key(text)  # latin or han
    own: tuple[str, ...] = key(words, ())  # frequent words
    others: tuple[str, ...] = key(words, ())  # of its neighbours
    requests: tuple[str, ...] = key(words, ())  # how prompts begin in its neighbours: they count twice


@dataclass(frozen=True, eq=False, kw_only=True)
class Language:
    """prompts/CODE/language.yaml."""

    code: str  # the folder's name
    name: str = key(text)
    names: tuple[str, ...] = key(words, ())  # in records, beside the code
    groups: tuple[str, ...] = key(words, ())  # --language GROUP
    everywhere: bool = key(switch, False)  # models chat in it when they are asked in another language
    colour: str = key(text, "#5b636e")  # in figures
    blanks: bool = key(switch, True)  # between words
    ngram: int = key(number, 10)  # words that make a loop when they come three times
    yes: str = key(text)
    no: str = key(text)
    outline: str = key(pattern)  # what extend.md calls the draft
    empty: tuple[str, ...] = key(words, ())  # words (characters, where there are no blanks) without matter of their own
    elided: str = key(pattern, NOTHING)  # cut off a word before it is compared
    demand: Demand = key(Demand)  # type: ignore[arg-type]
    chatter: Chatter = key(Chatter)  # type: ignore[arg-type]
    endings: Endings = key(Endings)  # type: ignore[arg-type]
    detection: Detection | None = key(Detection, None)  # type: ignore[arg-type]


def _section(kind: Any, value: Any, at: str, path: Path, **known: Any) -> Any:
    """A section as an instance of its class; UserError names the key that is missing, unknown or wrong."""
    if not isinstance(value, dict):
        raise UserError(f"{path}: {at or 'the file'} is not a mapping of keys to values", PAGE)
    value = dict(value)
    macros = _macros(value, at, path)
    wanted = {f.name: f for f in fields(kind) if f.name not in known}
    for name in value:
        if name not in wanted:
            raise UserError(f"{path}: the key {at}{name} is not known", PAGE)
    for name, f in wanted.items():
        read = f.metadata["read"]
        if name not in value:
            if f.default is MISSING and f.default_factory is MISSING:
                raise UserError(f"{path}: the key {at}{name} is missing", PAGE)
        elif isinstance(read, type):
            known[name] = _section(read, value[name], f"{name}.", path)
        else:
            try:
                known[name] = read(value[name], macros)
            except ValueError as error:
                raise UserError(f"{path}: {at}{name}: {error}", PAGE) from None
    return kind(**known)


def _macros(value: dict, at: str, path: Path) -> dict[str, str]:
    """The section's own (`define`), and NAMES: all number words, the longest first."""
    try:
        macros = texts(value.pop("define", {}), {})
        names = [name for part in ("values", "multipliers") for name in numbers(value.get(part, {}), {})]
    except ValueError as error:
        raise UserError(f"{path}: {at}define, values or multipliers: {error}", PAGE) from None
    return macros | {"NAMES": either(map(re.escape, sorted(names, key=len, reverse=True)))}


@cache
def _load(folder: Path) -> Language:
    import yaml  # not with every --help

    path = folder / "language.yaml"
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing", "git checkout prompts, or docs/languages.md") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: {error.problem}", "put texts with : # [ { \\ in single quotes") from None
    except (yaml.YAMLError, ValueError) as error:  # a control character, a date that is none
        raise UserError(f"{path}: {' '.join(str(error).split())}", PAGE) from None
    return _section(Language, content, "", path, code=folder.name)


# ---------------------------------------------------------------------------------------------------------------------
# Which there are


@cache
def _codes(prompts: Path) -> tuple[str, ...]:
    folders = prompts.glob("*")
    found = sorted(path.name for path in folders if path.is_dir() and re.fullmatch(r"[a-z]{2,3}(-[a-z]+)?", path.name))
    if not found:
        raise UserError(f"{prompts} has no language", "git checkout prompts, or docs/languages.md")
    return tuple(found)


def codes() -> tuple[str, ...]:
    """The languages that there are, in the order of their codes."""
    return _codes(PROMPTS)


def language(code: str) -> Language:
    """UserError that names file and key where its language.yaml is damaged."""
    return _load(PROMPTS / code)


@cache
def _named(prompts: Path) -> dict[str, str]:
    """{a name in lower case: code}"""
    found: dict[str, str] = {}
    for code in _codes(prompts):
        for name in (code, _load(prompts / code).name, *_load(prompts / code).names):
            if found.setdefault(name.casefold(), code) != code:
                path = prompts / code / "language.yaml"
                raise UserError(f"{path}: the name {name!r} is also that of {found[name.casefold()]}")
    return found


def by_name(name: str) -> str:
    """The code of a language by any of its names ("English", "en-GB", "中文 (简体)"); "" = there is no such.

    Codes come first in a name: the "de" of "Português (de Brasil)" is a word.
    """
    if name in codes():
        return name
    named = _named(PROMPTS)
    first, *others = re.findall(r"[^\W_]+", name.casefold()) or [""]
    parts = [name.casefold(), first, *(part for part in others if not re.fullmatch("[a-z]{2,3}", part))]
    return next(filter(None, map(named.get, parts)), "")


@cache
def _groups(prompts: Path) -> dict[str, tuple[str, ...]]:
    """{"all": every code, group: its codes}"""
    every = _codes(prompts)
    names = dict.fromkeys(name for code in every for name in _load(prompts / code).groups)
    members = {name: tuple(c for c in every if name in _load(prompts / c).groups) for name in names}
    return {"all": every, DEFAULT: every, DEMO: every} | members


def spelt(asked: str) -> str:
    """--language as settings keep it: a code, a group, or codes with commas between. ValueError: no such language."""
    if asked in codes():  # whatever the files of others hold
        return asked
    groups, found = _groups(PROMPTS), set()
    for part in filter(None, re.split(r"\s*,\s*", asked.strip())):
        if part not in groups and not by_name(part):
            raise ValueError(f"{part!r} is not served: {', '.join([*codes(), *groups])}, or several with commas")
        found |= set(groups.get(part, [by_name(part)]))
    if not found:
        raise ValueError("no language is named")
    members = tuple(sorted(found))
    if len(members) == 1:
        return members[0]
    return asked if asked in groups else next((k for k, v in groups.items() if v == members), ",".join(members))


def chosen(asked: str) -> tuple[str, ...]:
    """The codes that --language names, in order."""
    if asked in codes():
        return (asked,)
    groups = _groups(PROMPTS)
    return tuple(sorted({code for part in asked.split(",") for code in groups.get(part, [part])}))


def files(name: str, asked: str = "all") -> list[Path]:
    """The file of that name of each language asked for that has one."""
    return [path for code in chosen(asked) if (path := PROMPTS / code / name).exists()]


@cache
def heard(language: Language) -> tuple[Language, ...]:
    """The languages whose phrases may stand in a text of this one: its own, and those that models fall into."""
    others = [_load(PROMPTS / code) for code in codes()]
    return (language, *(other for other in others if other.everywhere and other.code != language.code))
