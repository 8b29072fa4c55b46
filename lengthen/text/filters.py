"""Which answers are accepted: complete, no loop, in the record's language, no chatter (method section 4).

Each function is linear in the length of its text. `language` is a code of prompts/ throughout: what is said in a
language stands in its language.yaml.
"""

import re
from collections import Counter
from collections.abc import Iterable
from functools import cache

from lengthen.text import languages
from lengthen.text.languages import Language, either, heard
from lengthen.text.words import detect_language, tokens

# ---------------------------------------------------------------------------------------------------------------------
# Loops

LOOP_COUNT = 3  # occurrences of one n-gram
MAX_REPEATED_SHARE = 0.02  # of the text; lets a long name occur twice in thousands of words
# One to four characters, a hundred times on end: loops without words (dashes, "hahaha…") that n-grams cannot see.
_RUN = re.compile(r"(\S.{0,3}?)\1{99}")


def repeats(text: str, language: str) -> tuple[int, float]:
    """Return how often the most frequent n-gram occurs, and the share of the words that repeated n-grams cover.

    An n-gram is as many words as its language says (10 in English, 13 in Chinese, as in the release), and repeated
    when it occurs twice or more; every occurrence counts. A text shorter than an n-gram gives (0, 0.0).
    """
    words, n = tokens(text), languages.language(language).ngram
    if len(words) < n:
        return 0, 0.0
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    counts = Counter(ngrams)
    covered, end = 0, 0  # `end`: first word not yet counted, so that overlapping n-grams count a word once
    for start, ngram in enumerate(ngrams):
        if counts[ngram] > 1:
            covered += start + n - max(start, end)
            end = start + n
    return max(counts.values()), covered / len(words)


def is_loop(text: str, language: str) -> bool:
    """True when an n-gram occurs three times or more, or a few characters repeat a hundred times on end."""
    return repeats(text, language)[0] >= LOOP_COUNT or _RUN.search(text) is not None


# ---------------------------------------------------------------------------------------------------------------------
# Chatter: what a model says about its answer, not in it. Whole phrases, and only at the start of a sentence: a text may
# well speak of conversion, of versions or of a paragraph (the release rejects all three).
#
# One phrase a line of language.yaml, a regular expression but for these: a space is any white space, "…" is the rest of
# a clause, "~" up to four words, and the words under `short` ("is", "am", "have") also match their short forms.


def _phrases(language: Language, lines: Iterable[str]) -> str:
    pattern = "|".join(lines).replace("~", r"(?:[\w'-]+\s+){0,4}?").replace("…", r"[^.!?。！？:：\n]{0,200}?")
    for long, short in language.chatter.short.items():
        pattern = re.sub(rf" {long}\b", rf"(?: {long}|{short})", pattern)
    return pattern.replace(" ", r"\s+")


class _Chatter:
    """The phrases that count in texts of a language, compiled."""

    def __init__(self, language: Language):
        spoken = heard(language)
        self.opening = self._compile(_phrases(one, one.chatter.openings) for one in spoken)
        self.closing = self._compile(_phrases(one, one.chatter.closings) for one in spoken)
        self.middle = self._compile(_phrases(one, one.chatter.inside) for one in spoken)
        self.refusal = self._compile(_phrases(one, one.chatter.refusals) for one in spoken)
        self.itself = re.compile(either(line for one in spoken for line in one.chatter.itself), re.IGNORECASE)

    @staticmethod
    def _compile(patterns: Iterable[str]) -> re.Pattern:
        return re.compile(rf"(?:{either(filter(None, patterns))})(?![a-z])", re.IGNORECASE)


_chatter = cache(_Chatter)

# What may stand before a sentence; no quotes: what a character says is not what the model says.
_MARKS = re.compile(r"[\s>#*_~-]*")
_RULE = re.compile(r"\s*(?:[-*_=]\s*){3,}")
# The look-behind keeps a long row of dots linear: only its first one is tried.
_SENTENCE = re.compile(r"(?:(?<![.!?…])[.!?…]+[\"'”’)\]*_]*(?=\s|$)|[。！？]+[”’」』）*_]*)\s*")
_ANNOUNCED = re.compile(rf"(?:[:：]\**(?=\s|$)|：)\s*|{_SENTENCE.pattern}")  # after "Here is the article:" it begins


def _starts(phrases: re.Pattern, line: str, position: int = 0) -> re.Match | None:
    marks = _MARKS.match(line, position)
    return phrases.match(line.replace("’", "'"), marks.end() if marks else position)


def _without_opening(line: str, opening: re.Pattern) -> str:
    """The line without the chatty sentences it begins with; all of it goes when it also ends in an announcement."""
    rest = line
    while chat := _starts(opening, rest):
        if line.rstrip(" *_").endswith((":", "：")):
            return ""
        # A phrase that ends in "!" or ":" is whole; any other runs to the end of its sentence.
        end = _ANNOUNCED.search(rest, chat.end() - 1)
        rest = rest[end.end() :] if end else ""
    return rest


def _without_closing(line: str, closing: re.Pattern) -> str:
    """The line without the chatty sentences it ends with; a remark in brackets goes from its bracket on."""
    starts = [0] + [match.end() for match in _SENTENCE.finditer(line) if match.end() < len(line)]
    while starts and _starts(closing, line, starts[-1]):
        line = line[: starts.pop()]
    return line.rstrip()


def strip_chatter(text: str, language: str) -> tuple[str, bool]:
    """Strip chatty sentences off the first two and the last three lines; return (text, whether any was stripped).

    Rules ("---") at the edges go too. Models answer Chinese requests with English remarks and the other way round, so
    beside the phrases of `language` those of such widespread languages apply.
    """
    phrases = _chatter(languages.language(language))
    original = text.strip().replace("\r\n", "\n")
    lines = _trim(original.split("\n"))
    for _ in range(2):
        if lines and (rest := _without_opening(lines[0], phrases.opening)) != lines[0]:
            lines = _trim([rest, *lines[1:]])
    for _ in range(3):
        if lines and (rest := _without_closing(lines[-1], phrases.closing)) != lines[-1].rstrip():
            lines = _trim([*lines[:-1], rest])
    stripped = "\n".join(lines)
    return stripped, stripped != original


def _trim(lines: list[str]) -> list[str]:
    """Without blank lines and rules at either edge."""
    keep = [i for i, line in enumerate(lines) if line.strip() and not _RULE.fullmatch(line)]
    return lines[keep[0] : keep[-1] + 1] if keep else []


def has_chatter(text: str, language: str) -> bool:
    """True when a line starts with talk about the answer, or a sentence speaks as an AI model."""
    phrases = _chatter(languages.language(language))
    return phrases.itself.search(text) is not None or any(_starts(phrases.middle, line) for line in text.split("\n"))


def is_refusal(text: str, language: str) -> bool:
    """True when one of the first three sentences declines the task; not what a character says, in quotes."""
    refusal, line = _chatter(languages.language(language)).refusal, text.strip().partition("\n")[0]
    starts = [0, *(match.end() for match in _SENTENCE.finditer(line))][:3]
    return any(_starts(refusal, line, start) for start in starts)


# ---------------------------------------------------------------------------------------------------------------------
# Acceptance (method section 4)

_ENDS = tuple(".!?…。！？")
_CLOSERS = "\"'”’»)]}」』）］】》*_` "  # quotes, brackets and Markdown's marks may follow the end of a sentence
_GOES_ON = tuple(",;:-–—，；：、")
_LIST_ITEM = re.compile(r"\s*(?:[-+•]|\*(?=\s)|\d{1,3}[.)、．]|[(（]?\d{1,3}[)）]|[一二三四五六七八九十]+、)\s*\S")
# Alone in the last line: a list or a text that was cut before its next part.
_LIST_MARK = re.compile(
    r"\s*(?:[-*+•]|\d{1,3}[.)、．]|\**(?:\d{1,3}|[A-Z]|[IVX]+)\.\**|[(（].{1,3}[)）]|[一二三四五六七八九十]+、)\s*"
)
_HEADING = re.compile(r"\s{0,3}#{1,6}\s")
_NAME_OF_PART = re.compile(r"(?:\s*[-*+•]|\s*\d{1,3}[.)、．])\s*\*\*[^*]+\*\*")  # "3. **Cost**", where others go on
_TABLE_ROW = re.compile(r"\s*\|.*\|\s*")
_NEXT_NUMBER = re.compile(r"[.!?:] \d{1,3}\.$")  # a list in one line: "… a chair. 22."
_FENCE = re.compile(r"^[^\S\n]*(?:```|~~~)", re.MULTILINE)
# Whole last lines that end a text without a full stop, in any language: a date, a dash and a name, hashtags.
_LAST_LINE = (
    r"\W*\d{4}[-/.]\d{1,2}[-/.]\d{1,2}\W*",
    r"[—–]{1,2} *(?-i:[A-ZÀ-Þ\u3040-\u30ff\u4e00-\u9fff]).{1,50}",
    r"(?:[^\w#]*#\w+)+\W*",
)
# What stands last in its line and ends a text: a link or an address, a closing tag, the end of a formula, an emoticon,
# an emoji (with what may follow it), a printer's end mark.
_LAST_MARK = re.compile(
    r"(?:(?:https?://|www\.)[\w-]+\.[\w.-]+\S*|\]\([^\s)]+\)|[\w.+-]+@[\w-]+(?:\.[\w-]+)+|</\w+>|-->|\$\$|\\\]"
    r"|\\end\{\w+\*?\}|(?<!\S)[:;]-?[)D]|[\u3040-\u30ff\u4e00-\u9fff][~～]|[∎■□◆\u2600-\u27bf\u2b50\U0001f000-\U0001faff][\ufe0f\u200d♀♂]*)\s*"
)
_NAME_AFTER = re.compile(r"[,，:：] *[A-ZÀ-Þ\u3040-\u30ff\u4e00-\u9fff\[]")  # "With love, Anna"
SIGNATURE_LINES, VERSE_LINES = 7, 4  # at most under a farewell; at least of a poem


_JOINED = {True: r"(?:.*[\W_])?(?:{})", False: ".*(?:{})"}  # a last word; in a script without blanks, the end of one


class _Endings:
    """How texts of a language end, compiled."""

    def __init__(self, language: Language):
        spoken = heard(language)
        lines = [*_LAST_LINE, *(line for one in spoken for line in one.endings.last_lines)]
        farewells = [line for one in spoken for line in one.endings.farewells]
        abbreviations = [word for one in spoken for word in one.endings.abbreviations]
        joining = (_JOINED[one.blanks].format(either(one.endings.joining)) for one in spoken)
        self.last_line = re.compile("|".join(lines), re.IGNORECASE)
        self.farewell = re.compile(rf"\W*(?:{either(farewells)})", re.IGNORECASE)
        self.abbreviation = re.compile(rf"\b(?:{either(abbreviations)})\.$", re.IGNORECASE)
        self.joining = re.compile("|".join(joining), re.IGNORECASE)
        self.closers = _CLOSERS + language.endings.closers


_endings = cache(_Endings)


def is_complete(text: str, language: str) -> bool:
    """True when a text ends as texts end.

    With . ! ? … 。！？ and closing marks; a list item or a table row; a closed code block, formula or tag; a link, an
    emoji; a signature or a date, words like THE END, a hashtag; or as verse.
    """
    ends = _endings(languages.language(language))
    lines = text.strip().split("\n")
    last = lines[-1].rstrip()
    bare = last.rstrip(ends.closers)
    if len(_FENCE.findall(text)) % 2 or text.count("$$") % 2:  # a block that was never closed
        return False
    if ends.last_line.fullmatch(last) and not ends.joining.fullmatch(bare):
        return True
    if (
        _HEADING.match(last)
        or _LIST_MARK.fullmatch(last)
        or ends.abbreviation.search(bare[-8:])
        or _NEXT_NUMBER.search(bare[-6:])
    ):
        return False
    if bare.endswith(_ENDS) or _TABLE_ROW.fullmatch(last) or _FENCE.match(last) or _ends_in_mark(last):
        return True
    if not bare or bare.endswith(_GOES_ON) or ends.joining.fullmatch(bare):
        return False
    if _LIST_ITEM.match(last):
        named = [line for line in lines[:-1] if _NAME_OF_PART.match(line)]
        return not (_NAME_OF_PART.fullmatch(last) and any(not _NAME_OF_PART.fullmatch(line.rstrip()) for line in named))
    filled = [line.strip() for line in lines if line.strip()]
    return _is_signed(filled, ends.farewell) or _is_verse(filled)


def _ends_in_mark(line: str) -> bool:
    tail = line[-400:]  # of a long line only its end: each start of a match is tried
    return any(match.end() == len(tail) for match in _LAST_MARK.finditer(tail))


def _is_signed(lines: list[str], farewell: re.Pattern) -> bool:
    """A farewell ("Best regards,"), and below it, or after it, a name and what goes with a name: short lines."""
    for i in range(len(lines) - 1, max(-1, len(lines) - 2 - SIGNATURE_LINES), -1):
        # Names begin with a capital, "[Your name]" with its bracket.
        if len(lines[i]) > 60 or not re.match(r"[^a-z]", lines[i]) or lines[i].count("[") > lines[i].count("]"):
            return False
        if farewell.match(lines[i]):
            return i < len(lines) - 1 or _NAME_AFTER.search(lines[i]) is not None
    return False


def _is_verse(lines: list[str]) -> bool:
    """Short lines to the end that begin with capitals (or ideographs) and mostly end in no full stop."""
    verse = lines[-4 * VERSE_LINES :]
    while verse and (len(verse[0]) > 70 or len(tokens(verse[0])) > 14):
        verse = verse[1:]
    sizes = [len(tokens(line)) for line in verse]
    if len(verse) < VERSE_LINES or max(sizes) > 14 or min(sizes) < 1 or max(map(len, verse)) > 70:
        return False
    if any(_HEADING.match(line) or _LIST_ITEM.match(line) or re.search("[:：](?:\\s|$)", line) for line in verse[1:]):
        return False
    capitals = sum(re.match(r"[\W_]*[^\Wa-z_]", line) is not None for line in verse)
    stops = sum(line.rstrip(_CLOSERS).endswith(_ENDS) for line in verse)
    middle = sorted(sizes)[len(sizes) // 2]
    return 4 * capitals >= 3 * len(verse) and 2 * stops <= len(verse) and 2 * sizes[-1] >= middle >= 3


def finish_reason(finish: str, ends: tuple[str, ...] = ("eos",)) -> str:
    """Why a text that finished like this is of no use; "" = it ended as it should, by one of `ends`.

    "error" and "repetition" say more than "unfinished", which stands for all others ("length", an unwanted "stop").
    """
    if finish in ends:
        return ""
    return finish if finish in ("error", "repetition") else "unfinished"


def clean_answer(text: str, finish: str, language: str) -> tuple[str, str]:
    """Strip chatter off a model's answer and judge it as a draft, an extension or a target.

    Returns:
        (the text without chatty first and last lines, reason). "" = accepted; else that of `finish_reason`, or the
        first of "empty", "refusal", "ending", "repetition" (an n-gram three times, or repeated ones over 2 % of the
        text), "language" and "chatter" that applies.
    """
    if reason := finish_reason(finish):
        return text.strip(), reason
    if not tokens(text):
        return text.strip(), "empty"
    if is_refusal(text, language):  # before its first sentence goes as chatter
        return text.strip(), "refusal"
    cleaned, stripped = strip_chatter(text, language)
    if not tokens(cleaned):
        return cleaned, "chatter"
    if not is_complete(cleaned, language):
        return cleaned, "ending"
    most, share = repeats(cleaned, language)
    if most >= LOOP_COUNT or share > MAX_REPEATED_SHARE or _RUN.search(cleaned):
        return cleaned, "repetition"
    # Halves as well, so that a text which drifts into another language midway is not outvoted by its start.
    middle = len(cleaned) // 2
    halves = {detect_language(cleaned[:middle]), detect_language(cleaned[middle:])}
    if detect_language(cleaned) != language or halves - {language, ""}:
        return cleaned, "language"
    # What is left must stand alone: nothing that goes on from the sentence cut off.
    if has_chatter(cleaned, language) or (stripped and re.match(r"[a-z,;:)]", cleaned)):
        return cleaned, "chatter"
    return cleaned, ""
