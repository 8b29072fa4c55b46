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

from lengthen.text.filters import LOOP_COUNT, NGRAM
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

    A word lies in a loop when an n-gram that makes the text one (10 words, in Chinese 13; LOOP_COUNT times or more)
    covers it, the first occurrence included. Tenth t of W words are the words from floor(t W / 10) on.
    """
    words, n = tokens(text), NGRAM[language]
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

# Words without matter of their own, and words of the task itself: "write an essay of 900 words" is about neither.
_EMPTY_WORDS = frozenset(
    "a about above after again all also although always am among an and any are around as at be because been before "
    "being below between both but by can cannot come comes could did do does doing down during each either else even "
    "every few for from get give gives had has have having he her here hers him his how i if in into is it its itself "
    "just keep let like made make makes many may me might more most much must my never no nor not of off on once one "
    "only or other others our out over own per put rather same several shall she should show so some still such take "
    "takes tell tells than that the their them then there these they this those three through to too two under until "
    "up upon us use used using very was way we well were what when where whether which while who whom whose why will "
    "with within without would yet you your yours "
    "answer approximately article chapter cover describe detail detailed discuss essay exactly explain fewer guide "
    "include including length less limit long longer max maximum minimum paragraph please report section sentence "
    "short shorter speech story text title topic word words write writing written".split()
)
_EMPTY_CHARACTERS = frozenset(
    "的了是在和与及或也都就还又不没有这那其之而但并对为从到向把被让使以于着过地得个们你我他她它您请写篇字约左右"
    "一二三四五六七八九十百千万零两多少大小上下中内至超要求能会可可以关于如何什么怎样以及说明介绍描述文章"
)
_IDEOGRAPH_RUN = re.compile(rf"[{IDEOGRAPHS}]{{2,}}")
STEM = 5  # letters; "explain" and "explanation" agree


def content_words(query: str, answer: str, language: str) -> float | None:
    """Share of the query's content words that the answer uses, whatever their order; None where the query has none.

    English: words of letters that are not in a list of empty ones, each cut to its first five letters. Chinese: pairs
    of neighbouring characters neither of which is in a list of empty ones. A long answer finds it easier than a short
    one: this tells an answer off the subject, and ranks no two that are on it.
    """
    asked = _content(query, language)
    return len(asked & _content(answer, language)) / len(asked) if asked else None


def _content(text: str, language: str) -> set[str]:
    if language == "zh":
        pairs = (run[i : i + 2] for run in _IDEOGRAPH_RUN.findall(text) for i in range(len(run) - 1))
        return {pair for pair in pairs if not set(pair) & _EMPTY_CHARACTERS}
    words = (re.sub(r"n['’]t$|['’].*", "", word) for word in tokens(text))
    return {word[:STEM] for word in words if len(word) > 2 and word.isalpha() and word not in _EMPTY_WORDS}
