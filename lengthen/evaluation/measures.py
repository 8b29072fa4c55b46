"""What is measured on texts and on lists of numbers, without a model.

The numbers of an evaluation are means, medians or rank correlations of what the functions below say of one answer each;
intervals.py adds how far to trust them. None = not defined for this text. Lengths change most measures of style by
themselves (a long text must repeat words), so distinct-3 and compression look at the first PREFIX_WORDS words only and
leave shorter answers out. Only the standard library.
"""

import re
import statistics
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import cache

from lengthen.text import languages
from lengthen.text.filters import LOOP_COUNT
from lengthen.text.words import IDEOGRAPHS, quantile, tokens

PREFIX_WORDS = 200
# On so many tokens own and other query are compared: the more of a text is known, the less either of them tells.
OPENING_TOKENS = 256

# ---------------------------------------------------------------------------------------------------------
# Numbers


def mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def median(values: Sequence[float]) -> float | None:
    return quantile(values, 0.5)


def p90(values: Sequence[float]) -> float | None:
    return quantile(values, 0.9)


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, ties sharing their average."""
    order = sorted(range(len(values)), key=values.__getitem__)
    result, start = [0.0] * len(values), 0
    for stop in range(1, len(order) + 1):
        if stop == len(order) or values[order[stop]] != values[order[start]]:
            for i in order[start:stop]:
                result[i] = (start + 1 + stop) / 2
            start = stop
    return result


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation, ties sharing ranks; None where a side is constant, or with fewer than 5 pairs."""
    x, y = zip(*pairs, strict=True) if pairs else ((), ())
    if len(x) < 5 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return statistics.correlation(ranks(x), ranks(y))


# ---------------------------------------------------------------------------------------------------------
# Lengths


def longbench_score(words: int, required: float) -> float:
    """The length score S_l of LongBench-Write (arXiv 2408.07055, evaluation/eval_length.py), 0 to 100.

    100 at the required length only, falling linearly in words / required to 0 at 4 times, and linearly in
    required / words to 0 at a third. LonGen's (demands.length_score) has a plateau and is 0 at half and at 1.5 times.
    """
    if words > required:
        return 100 * max(0.0, 1 - (words / required - 1) / 3)
    return 100 * max(0.0, 1 - (required / words - 1) / 2) if words else 0.0


# ---------------------------------------------------------------------------------------------------------
# Repetition


def loop_by_tenth(text: str, language: str) -> list[float] | None:
    """For each tenth of the text's words, the share of them that lie in a loop; None for fewer than ten words.

    A word lies in a loop when an n-gram that makes the text one (the language's `ngram`; LOOP_COUNT times or more)
    covers it, the first occurrence included. Tenth t of W words are the words from floor(t W / 10) on.
    """
    words, n = tokens(text), languages.language(language).ngram
    if len(words) < 10:
        return None
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    counts = Counter(ngrams)
    looping, end = [0] * len(words), 0  # `end`: first word not yet looked at
    for start, ngram in enumerate(ngrams):
        if counts[ngram] >= LOOP_COUNT:
            first = max(start, end)
            end = start + n
            looping[first:end] = [1] * (end - first)
    edges = [t * len(words) // 10 for t in range(11)]
    return [statistics.fmean(looping[a:b]) for a, b in zip(edges, edges[1:], strict=False)]


def distinct_3(text: str) -> float | None:
    """Share of different word trigrams in the first PREFIX_WORDS words; 1 = no three words in a row come twice."""
    words = tokens(text)[:PREFIX_WORDS]
    if len(words) < PREFIX_WORDS:
        return None
    return len(set(zip(words, words[1:], words[2:], strict=False))) / (PREFIX_WORDS - 2)


def compression(text: str) -> float | None:
    """Bytes over zlib's bytes (level 9) of the first PREFIX_WORDS words, lower-cased, a space between each two.

    About 2 for English prose, more the more a text repeats itself, down to the spelling; compare within a language.
    """
    words = tokens(text)[:PREFIX_WORDS]
    if len(words) < PREFIX_WORDS:
        return None
    data = " ".join(words).encode("utf-8", "replace")
    return len(data) / len(zlib.compress(data, 9))


# ---------------------------------------------------------------------------------------------------------
# On the query's matter

_RUN = re.compile(rf"[{IDEOGRAPHS}\u30a1-\u30fa\u30fc]{{2,}}")  # and Katakana: what words of matter are written in
STEM = 5  # letters; "explain" and "explanation" agree


def content_words(query: str, answer: str, language: str) -> float | None:
    """Share of the query's content words that the answer uses, whatever their order; None where the query has none.

    Words of letters that are not in the language's list of empty ones, each cut to its first five letters; in a script
    without blanks pairs of neighbouring characters neither of which is in that list. A long answer finds it easier than
    a short one: this tells an answer off the subject, and ranks no two that are on it.
    """
    asked = _content(query, language)
    return len(asked & _content(answer, language)) / len(asked) if asked else None


def _content(text: str, language: str) -> set[str]:
    own = languages.language(language)
    if not own.blanks:
        pairs = (run[i : i + 2] for run in _RUN.findall(text) for i in range(len(run) - 1))
        return {pair for pair in pairs if not set(pair) & _empty(own)}
    words = (re.sub(own.elided, "", word) for word in tokens(text))
    return {word[:STEM] for word in words if len(word) > 2 and word.isalpha() and word not in _empty(own)}


@cache
def _empty(language: languages.Language) -> frozenset[str]:
    return frozenset(language.empty)
