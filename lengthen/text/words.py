"""Words, languages, paragraphs and lines of plain text in English and Chinese.

Only the standard library; each function is linear in the length of its text, because the texts are thousands of words
and come by the thousand. `language` is "en" or "zh" throughout; method sections are those of the paper
(arXiv 2410.23933).
"""

import math
import random
import re
from collections import Counter
from collections.abc import Sequence

# Ideographs and two signs written among them (々 repeats one, 〇 is a zero); kana and hangul are letters, not these.
IDEOGRAPHS = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
KANA = "\u3040-\u30ff"
# A letter or digit that is no ideograph; combining accents stay inside their word.
_LETTER = rf"(?:[^\W_{IDEOGRAPHS}][\u0300-\u036f]*)"
_IDEOGRAPH = re.compile(rf"[{IDEOGRAPHS}]")
_WORD = re.compile(rf"{_LETTER}+(?:['’.,\-‐‑]{_LETTER}+)*")
_TOKEN = re.compile(rf"[{IDEOGRAPHS}]|{_WORD.pattern}")
_LATIN_WORD = re.compile(r"[A-Za-z\u00c0-\u024f]+")
_OTHER_LETTER = re.compile(rf"[^\W\d_A-Za-z\u00aa\u00ba\u00b5\u00c0-\u024f{IDEOGRAPHS}]")

# Common short words of the languages that share the Latin alphabet: enough to tell English from its neighbours.
_ENGLISH = frozenset("the of and to is that it was for with are this be by from not have his her their you".split())
_NOT_ENGLISH = frozenset(
    "le la les des du une et est dans que qui pour au aux sur il elle nous vous ce cette "
    "der das und ist den dem ein eine nicht mit von zu sich auf auch für "
    "el los las del y en por para con una su como más pero es lo al "
    "il di che non della dei gli sono nel o os um uma não com da dos das em mais se".split()
)
# What prompts in these languages begin with: a short one may have no other word that tells.
_REQUESTS = frozenset(
    "écris écrivez écrire rédige rédigez décris décrivez explique expliquez raconte racontez "
    "schreib schreibe schreiben verfasse verfassen erkläre beschreibe erzähle "
    "escribe escriba escribir redacta explica cuéntame cuenta escreva explique descreva "
    "scrivi scrivere spiega descrivi racconta schrijf beschrijf skriv beskriv napisz opisz yaz tulis tuliskan buatlah "
    "kirjoita napiš írj scrie hãy viết".split()
)

# ---------------------------------------------------------------------------------------------------------------------
# Words and language


def tokens(text: str) -> list[str]:
    """The words that `count_words` counts, in order, lower-cased: ideographs one by one, other words whole."""
    return _TOKEN.findall(text.lower())


def count_words(text: str) -> int:
    """Words by the strict measure, for `*_words` fields and every statement about growth.

    An ideograph is one word; so is a run of letters and digits with ' - . , inside ("don't", "3,000.5"). Punctuation of
    either script, Markdown marks and table bars are none.
    """
    return len(_TOKEN.findall(text))


_LONGEN_CJK = re.compile(r"[\u4e00-\u9fff\u3000-\u303f\uff00-\uffef]")


def longen_words(text: str) -> int:
    """Words by the measure that LonGen publishes, for its score only.

    Every character of U+4E00-9FFF, U+3000-303F and U+FF00-FFEF is one, its punctuation included; the rest is split on
    white space, so that a table bar or a dash between blanks is a word too.
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
    """Return "en", "zh" or "" (neither): the script and language of more than half of the words."""
    num_cjk = len(_IDEOGRAPH.findall(text))
    latin = _LATIN_WORD.findall(text)
    num_other = len(_OTHER_LETTER.findall(text))
    half = (num_cjk + len(latin) + num_other) / 2
    if num_cjk > half:
        # Japanese can be mostly ideographs, but never goes without kana.
        num_kana = len(re.findall(rf"[{KANA}]", text))
        return "zh" if 10 * num_kana < num_cjk else ""
    if len(latin) > half:
        counts = Counter(word.lower() for word in latin)
        english = sum(counts[word] for word in _ENGLISH)
        foreign = sum(counts[word] for word in _NOT_ENGLISH) + 2 * sum(counts[word] for word in _REQUESTS)
        return "en" if foreign <= max(english, 1) else ""
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Paragraphs and lines

_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


def split_paragraphs(text: str) -> tuple[list[str], str]:
    """Return the non-empty paragraphs and the separator that joins them again (method section 3).

    Paragraphs end at blank lines ("\\n\\n"); where that gives two or fewer, and lines give more, lines are paragraphs
    ("\\n"). A text of one line is one paragraph: the caller must be ready for it.
    """
    text = text.replace("\r\n", "\n")
    blocks = [part.strip("\n") for part in _BLANK_LINES.split(text) if part.strip()]
    if len(blocks) > 2:
        return blocks, "\n\n"
    lines = [line for line in text.split("\n") if line.strip()]
    return (lines, "\n") if len(lines) > len(blocks) else (blocks, "\n\n")


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
