"""Words, languages, paragraphs and lines of plain text.

Each function is linear in the length of its text, because the texts are thousands of words and come by the thousand.
Method sections are those of the paper (arXiv 2410.23933).
"""

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from lengthen.text import languages
from lengthen.text.languages import Detection

# Ideographs and two signs written among them (々 repeats one, 〇 is a zero).
IDEOGRAPHS = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Hiragana and Katakana (Unicode's scripts), with the long-vowel mark: written, as ideographs are, without blanks.
KANA = "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
# A letter or digit of a script with blanks; combining accents stay inside their word.
_LETTER = rf"(?:[^\W_{IDEOGRAPHS}{KANA}][\u0300-\u036f]*)"
_IDEOGRAPH = re.compile(rf"[{IDEOGRAPHS}]")
_WORD = re.compile(rf"{_LETTER}+(?:['’.,\-‐‑]{_LETTER}+)*")
_TOKEN = re.compile(rf"[{IDEOGRAPHS}{KANA}]|{_WORD.pattern}")
_LATIN_WORD = re.compile(r"[A-Za-z\u00c0-\u024f]+")
_OTHER_LETTER = re.compile(rf"[^\W\d_A-Za-z\u00aa\u00ba\u00b5\u00c0-\u024f{IDEOGRAPHS}]")

LIBRARY_SURE = 0.7  # probability from which the library overrules a rule that found no more words than against it

# ---------------------------------------------------------------------------------------------------------------------
# Words and language


def tokens(text: str) -> list[str]:
    """The words that `count_words` counts, in order, lower-cased: ideographs and kana one by one, others whole."""
    return _TOKEN.findall(text.lower())


def count_words(text: str) -> int:
    """Words by the strict measure, for `*_words` fields and every statement about growth.

    An ideograph or kana is one word; so is a run of letters and digits with ' - . , inside ("don't", "3,000.5").
    Punctuation of any script, Markdown marks and table bars are none.
    """
    return len(_TOKEN.findall(text))


_LONGEN_CJK = re.compile(rf"[\u4e00-\u9fff\u3000-\u303f\uff00-\uffef{KANA}]")


def longen_words(text: str) -> int:
    """Words by the measure that LonGen publishes, for its score only.

    Every character of U+4E00-9FFF, U+3000-303F and U+FF00-FFEF is one, its punctuation included; the rest is split on
    white space, so that a table bar or a dash between blanks is a word too. Kana, which LonGen has not, are as
    ideographs.
    """
    rest, num_cjk = _LONGEN_CJK.subn(" ", text)
    return num_cjk + len(rest.split())


def quantile(lengths: Sequence[float], q: float) -> float | None:
    """The q-quantile with linear interpolation (numpy's default); None of nothing. The p90 of lengths is q = 0.9."""
    if not lengths:
        return None
    ordered, rank = sorted(lengths), q * (len(lengths) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (rank - low) * (ordered[high] - ordered[low])


def detect_language(text: str) -> str:
    """The code of the language of prompts/ that a text is in, "" for none: by script and words, else by a library.

    A language with a rule of its own (`detection` in its language.yaml) is tried first: a text that is mostly in its
    script, and has no more words of its neighbours than of its own. What no rule claims, py3langid tells apart.
    """
    num_han, latin = len(_IDEOGRAPH.findall(text)), _LATIN_WORD.findall(text)
    half = (num_han + len(latin) + len(_OTHER_LETTER.findall(text))) / 2
    if num_han > half:
        # Japanese can be mostly ideographs, but never goes without kana.
        script = "han" if 10 * len(re.findall(rf"[{KANA}]", text)) < num_han else ""
    else:
        script = "latin" if len(latin) > half else ""
    if not half:
        return ""
    for code in languages.codes():
        rule = languages.language(code).detection
        if rule and rule.script == script and (sure := _holds(rule, latin)) is not None:
            return code if sure else _by_library(text, LIBRARY_SURE) or code
    return _by_library(text)


def _holds(rule: Detection, words: list[str]) -> bool | None:
    """True: a text of these words is in the rule's language; None: it is not; False: the words do not tell."""
    counts = Counter(word.lower() for word in words)
    own = sum(counts[word] for word in rule.own)
    others = sum(counts[word] for word in rule.others) + 2 * sum(counts[word] for word in rule.requests)
    return None if others > max(own, 1) else own > others or not rule.own


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # 1 s: English and Chinese seldom need it

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _by_library(text: str, least: float = 0.0) -> str:
    """The likeliest language of prompts/ without a rule; "" where it is below `least`, or half as likely as another."""
    ranked = _identifier().rank(text)  # [(code, probability)], the likeliest first
    for code, probability in ranked:
        if code in languages.codes() and languages.language(code).detection is None:
            return code if probability >= max(least, ranked[0][1] / 2) else ""
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Paragraphs and lines

_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


def split_paragraphs(text: str) -> list[str]:
    """The non-empty paragraphs (method section 3).

    They end at blank lines; where that gives two or fewer, and lines give more, lines are paragraphs. A text of one
    line is one paragraph: the caller must be ready for it.
    """
    text = text.replace("\r\n", "\n")
    blocks = [part.strip("\n") for part in _BLANK_LINES.split(text) if part.strip()]
    if len(blocks) > 2:
        return blocks
    lines = [line for line in text.split("\n") if line.strip()]
    return lines if len(lines) > len(blocks) else blocks


def remove_lines(draft: str, keep: float = 0.8, seed: int = 0) -> str:
    """Drop each non-blank line with probability 1 - keep (method section 2, row 3), so that the Extender learns to add.

    What is left has the shape of a draft: surviving lines stay in their paragraph, one blank line stands between
    paragraphs, a paragraph that lost all its lines is gone without a trace. At least one line survives.
    """
    rng = random.Random(seed)
    paragraphs = [block.split("\n") for block in _BLANK_LINES.split(draft.replace("\r\n", "\n"))]
    kept = [[line for line in lines if line.strip() and rng.random() < keep] for lines in paragraphs]
    if not any(kept):
        lines = [line for block in paragraphs for line in block if line.strip()]
        return rng.choice(lines) if lines else ""
    return "\n\n".join("\n".join(lines) for lines in kept if lines)
