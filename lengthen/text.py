"""Measures and filters of plain text in English and Chinese: words, language, loops, chatter, selection.

Everything the stages decide about a text without a model is decided here, once, for both languages. Only the standard
library; each function is linear in the length of its text, because the texts are thousands of words and come by the
thousand. `language` is "en" or "zh" throughout; method sections are those of the paper (arXiv 2410.23933).
"""

import hashlib
import random
import re
import unicodedata
from collections import Counter

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
    "il di che per non della dei gli sono nel o os um uma não com do da dos das em mais se".split()
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
        foreign = sum(counts[word] for word in _NOT_ENGLISH)
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


# ---------------------------------------------------------------------------------------------------------------------
# Loops

NGRAM = {"en": 10, "zh": 13}  # words / tokens of Chinese text, as in the release
LOOP_COUNT = 3  # occurrences of one n-gram
MAX_REPEATED_SHARE = 0.02  # of the text; lets a long name occur twice in thousands of words
# One to four characters, a hundred times on end: loops without words (dashes, "hahaha…") that n-grams cannot see.
_RUN = re.compile(r"(\S.{0,3}?)\1{99}")


def repeats(text: str, language: str) -> tuple[int, float]:
    """Return how often the most frequent n-gram occurs, and the share of the words that repeated n-grams cover.

    An n-gram is 10 words, in Chinese 13 ideographs or words, and repeated when it occurs twice or more; every
    occurrence counts. A text shorter than an n-gram gives (0, 0.0).
    """
    words, n = tokens(text), NGRAM[language]
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
# One phrase a line, a regular expression but for these: a space is any white space, "is", "am", "have" … also match
# their short forms, "…" is the rest of a clause, "~" up to four words, WORK and REWORKED are the words below.

_WORK = (
    "version|rewrite|revision|draft|outline|article|essay|story|text|piece|post|guide|report|response|answer|"
    "expansion|continuation|instruction|query|prompt|content|paper|speech|script|poem|chapter"
)
_REWORKED = "rewritten|revised|expanded|extended|enriched|enhanced|improved|updated|polished|refined|edited|rephrased"
_OPENINGS = r"""
(sure|sure thing|certainly|of course|absolutely|okay|ok|alright|great|awesome|got it|understood)!
(sure|sure thing|certainly|of course|absolutely|okay|ok|alright|great)[,.:]? (here is|here are|i can|i would|let me)
(here is|here are|below is|the following is) ~(REWORKED) ~(WORK)
(here is|here are|below is|the following is) …(WORK)…:
here is (how|what) (i|you) …:
i am ~(excited|happy|glad|pleased|thrilled|delighted) to (share|help|assist|present|provide|offer|write)
i am here to (help|assist)
i would (be (happy|glad|delighted)|love) to (help|assist|share|provide|write|rewrite|expand)
i am ~(glad|happy) (that )?you (enjoyed|liked|found)
i will be (happy|glad|ready) (to|with) (help|assist|share|a|the|your)
(please )?share (the|your) (outline|draft|instructions?) with me
i have (now |also |carefully )?(REWORKED) (the|your|this) ~(WORK)
i have made (some|a few) ~(changes|edits|revisions|improvements)
i will (rewrite|expand|enrich|extend|revise)
let me (rewrite|expand|enrich|revise|help you|provide you)
as (requested|per your request|you requested|an ai|a language model|a large language model)
(thank you|thanks) for (sharing|providing|your (request|input|draft|outline|question|feedback))
based on your (draft|outline|request|instructions?|prompt|text)
your (opening|first|closing|original|introductory|REWORKED) (paragraph|sentence|line|WORK) (is|has|does|could|sets)
your (draft|outline) (is|has|does|could|provides|sets|needs|looks|was)
you have (done|written|provided|created) (a|an)
(in )?(the|this) (rewritten|revised|expanded|enriched|extended) (version|text|draft|outline|article|essay|story|piece)
(REWORKED) ~(WORK):
(当然|当然可以|好的|没问题|明白了?|收到)[!！。]
(当然|当然可以|好的|没问题)[，,](以下|下面|这是|这里|我来|我将|我会|我可以|我很|请)
(以下|下面)就?是(我|为您|为你|根据|按照|一[篇份个]|对|您|你|经过|完整|改写|扩写|扩展|丰富|润色|修改)…[：:。]
这就?是我?(为您|为你|根据|按照)…[：:。]
(根据|按照)[您你]所?(提供)?的?(要求|大纲|草稿|提纲|提示|指令|需求)
我(已经?|将|会|来)(为[您你]|根据|按照|对)…(改写|扩写|扩展|丰富|润色|修改)
作为(一个|一名|一款)?(AI|人工智能|大?语言)(语言)?(模型|助手)
我?很高兴能?(为[您你]|帮助|协助)
感谢[您你]的?(提供|分享|信任|提问)
[您你]的(开头|开篇|草稿|大纲|提纲|原文|第一段)(已经?|很|非常|可以|需要|写得)
"""
_CLOSINGS = r"""
i hope (this|these|that this|it|the above) …(helps?|helped|helpful|meets?|useful|expectations|requirements|looking for)
i hope (this|the|these) ~(REWORKED|WORK) (is|was|are|has|helps|meets|provides|gives|captures)
i hope (that )?you (find|found|like|liked|enjoy|enjoyed) (this|these|the|it)
(please )?(do )?let me know (if|what|how|whether|your|should)
(please )?feel free to (ask|let me|reach|adjust|modify|customi[sz]e|edit|expand|adapt|contact me)
if you (would|have|need|want|are) …(let me know|feel free|just ask|please ask|i would be|i am here|i can (help|also))
(would|do) you (like|want|need) me to
how does (this|that|it) (sound|look)
i would love to (hear|know) (your|what you)
what do you (think|want)\?
do you think (this|the) (topic|story|WORK) could be
you can (continue|expand|extend) (the|this) (story|WORK) or (add|change|include)
is there anything else (you|i)
(please )?note that (this is a|(this|the) (response|above|REWORKED|WORK))
[(（[【]?\s*(total )?words?( count)?( is| =|\s*[:：])\W*(about |approximately )?[\d,]+
[(（[【]\s*(about |approximately |~\s*)?[\d,]+ words\s*[)）\]】]
[(（[【]\s*(please )?note\s*[:：]
note\s*[:：] (i|this (is|WORK)|the (above|following|text|REWORKED|WORK)|please)
(the|this) (rewritten|revised|expanded|enriched|extended) (version|text|draft|outline|article|essay|story|piece)
i have (now |also |carefully )?(REWORKED) (the|your|this) ~(WORK)
希望(以上|这[篇份个些]|本文|上述|我的|能够?|对[您你]|[您你])…(帮助|满足|符合|满意|喜欢|有用|启发|参考)
如果?[您你]还?(有|需要|想|对|希望)…(告诉我|联系我|随时|请(让我知道|说明|提出|指出)|我(可以|会|很乐意))
请?随时(告诉我|联系我|提问|让我知道)
[(（[【]?\s*(全文|本文|正文|文章)?[总共约]?字数\s*(统计)?\s*(:|：|约|为|共)
[(（[【]\s*(全文|本文|正文)?[共约大计]+\s*[\d,]+\s*个?字\s*[)）\]】]
[(（[【]\s*注\s*[:：]
注\s*[:：]\s*(以上|本文|此文|这|上述|该|为)
以上[就便]?是(我|为[您你]|根据|对|扩写|改写|丰富|本次)
以上内容(仅供|是|为|由)
"""
# In the middle of a text a line that starts so begins a second answer, or talk about the first: there is no cutting it.
_INSIDE = r"""
here is (a|an|the|my|your) ~(rewritten|revised|expanded|enriched|extended|rephrased) ~(WORK)
i have (rewritten|expanded|enriched|extended|rephrased) (the|your|this) ~(WORK)
your (opening|REWORKED) (paragraph|sentence|line|WORK) (is|has|does|could|provides|sets)
i hope this (helps|meets|(REWORKED|version|rewrite|revision|expansion|draft))
let me know if (you would like|you (need|want|have) (me to|any|further)|there is anything)
in this (rewritten|revised|expanded|enriched|extended) (version|text|draft)
(the|this) (rewritten|revised|expanded|enriched) (version|text|draft|rewrite) (is|has|includes?|provides?|adds?|now|of)
(以下|下面)是我?(为[您你])?(改写|扩写|扩展|润色|修改|丰富)后?的
希望(以上|这篇|上述)…(对[您你]有|能帮助[您你]|满足[您你]|符合[您你])
[您你]的(草稿|大纲|提纲|原文)(已经?|很|非常|写得)
"""
_SELF = (
    r"\bas an ai (?:language )?(?:model|assistant)\b|\bas a (?:large )?language model,"
    r"|作为一[个名](?:AI|人工智能)(?:语言)?(?:模型|助手)"
)
_SHORT = {" is": "'s", " are": "'re", " am": "'m", " have": "'ve", " will": "'ll", " would": "'d"}


def _compile(phrases: str) -> re.Pattern:
    pattern = "|".join(line for line in phrases.split("\n") if line)
    pattern = pattern.replace("REWORKED", _REWORKED).replace("WORK", _WORK)
    pattern = pattern.replace("~", r"(?:[\w'-]+\s+){0,4}?").replace("…", r"[^.!?。！？:：\n]{0,200}?")
    for long, short in _SHORT.items():
        pattern = re.sub(rf"{long}\b", rf"(?: {long.strip()}|{short})", pattern)
    return re.compile(rf"(?:{pattern.replace(' ', chr(92) + 's+')})(?![a-z])", re.IGNORECASE)


_OPENING, _CLOSING, _MIDDLE = map(_compile, (_OPENINGS, _CLOSINGS, _INSIDE))
_SPEAKS_OF_ITSELF = re.compile(_SELF, re.IGNORECASE)
# What may stand before a sentence; no quotes: what a character says is not what the model says.
_MARKS = re.compile(r"[\s>#*_~-]*")
_RULE = re.compile(r"\s*(?:[-*_=]\s*){3,}")
# The look-behind keeps a long row of dots linear: only its first one is tried.
_SENTENCE = re.compile(r"(?:(?<![.!?…])[.!?…]+[\"'”’)\]*_]*(?=\s|$)|[。！？]+[”’」』）*_]*)\s*")
_ANNOUNCED = re.compile(rf"(?:[:：]\**(?=\s|$)|：)\s*|{_SENTENCE.pattern}")  # after "Here is the article:" it begins


def _starts(phrases: re.Pattern, line: str, position: int = 0) -> re.Match | None:
    return phrases.match(line.replace("’", "'"), _MARKS.match(line, position).end())


def _without_opening(line: str) -> str:
    """The line without the chatty sentences it begins with; all of it goes when it also ends in an announcement."""
    rest = line
    while chat := _starts(_OPENING, rest):
        if line.rstrip(" *_").endswith((":", "：")):
            return ""
        # A phrase that ends in "!" or ":" is whole; any other runs to the end of its sentence.
        end = _ANNOUNCED.search(rest, chat.end() - 1)
        rest = rest[end.end() :] if end else ""
    return rest


def _without_closing(line: str) -> str:
    """The line without the chatty sentences it ends with; a remark in brackets goes from its bracket on."""
    starts = [0] + [match.end() for match in _SENTENCE.finditer(line) if match.end() < len(line)]
    while starts and _starts(_CLOSING, line, starts[-1]):
        line = line[: starts.pop()]
    return line.rstrip()


def strip_chatter(text: str, language: str) -> tuple[str, bool]:
    """Strip chatty sentences off the first two and the last three lines; return (text, whether any was stripped).

    Rules ("---") at the edges go too. Models answer Chinese requests with English remarks and the other
    way round, so the phrases of both languages apply, whatever `language` is.
    """
    original = text.strip().replace("\r\n", "\n")
    lines = _trim(original.split("\n"))
    for _ in range(2):
        if lines and (rest := _without_opening(lines[0])) != lines[0]:
            lines = _trim([rest, *lines[1:]])
    for _ in range(3):
        if lines and (rest := _without_closing(lines[-1])) != lines[-1].rstrip():
            lines = _trim([*lines[:-1], rest])
    stripped = "\n".join(lines)
    return stripped, stripped != original


def _trim(lines: list[str]) -> list[str]:
    """Without blank lines and rules at either edge."""
    keep = [i for i, line in enumerate(lines) if line.strip() and not _RULE.fullmatch(line)]
    return lines[keep[0] : keep[-1] + 1] if keep else []


def has_chatter(text: str) -> bool:
    """True when a line starts with talk about the answer, or a sentence speaks as an AI model."""
    return _SPEAKS_OF_ITSELF.search(text) is not None or any(_starts(_MIDDLE, line) for line in text.split("\n"))


# ---------------------------------------------------------------------------------------------------------------------
# Acceptance (method section 4)

_ENDS = tuple(".!?…。！？")
_CLOSERS = "\"'”’»)]}」』）］】》*_` "  # quotes, brackets and Markdown's marks may follow the end of a sentence
_GOES_ON = tuple(",;:-–—，；：、")
_LIST_ITEM = re.compile(r"\s*(?:[-*+•]|\d{1,3}[.)、]|[(（]?\d{1,3}[)）]|[一二三四五六七八九十]+、)\s*\S")
_LIST_MARK = re.compile(r"\s*(?:[-*+•]|\d{1,3}[.)、]|\**\d{1,3}\.\**)\s*")
_TABLE_ROW = re.compile(r"\s*\|.*\|\s*")


def is_complete(text: str) -> bool:
    """True when a text ends as texts end: with . ! ? … 。！？ and closing marks, or with a list item or a table row."""
    last = text.rstrip().rsplit("\n", 1)[-1]
    bare = last.rstrip(_CLOSERS)
    if _LIST_MARK.fullmatch(last):  # "3." alone is a list cut short
        return False
    if bare.endswith(_ENDS) or _TABLE_ROW.fullmatch(last):
        return True
    return _LIST_ITEM.match(last) is not None and not bare.endswith(_GOES_ON)


def clean_answer(text: str, finish: str, language: str) -> tuple[str, str]:
    """Strip chatter off a model's answer and judge it as a draft, an extension or a target.

    Returns:
        (the text without chatty first and last lines, reason). "" = accepted; else the first of "unfinished" (`finish`
        is not "eos"), "empty", "ending", "repetition" (an n-gram three times, or repeated ones over 2 % of the text),
        "language" and "chatter" that applies.
    """
    if finish != "eos":
        return text.strip(), "unfinished"
    if not tokens(text):
        return text.strip(), "empty"
    cleaned, stripped = strip_chatter(text, language)
    if not tokens(cleaned):
        return cleaned, "chatter"
    if not is_complete(cleaned):
        return cleaned, "ending"
    most, share = repeats(cleaned, language)
    if most >= LOOP_COUNT or share > MAX_REPEATED_SHARE or _RUN.search(cleaned):
        return cleaned, "repetition"
    # Halves as well, so that a text which drifts into the other language midway is not outvoted by its start.
    middle, other = len(cleaned) // 2, {"en": "zh", "zh": "en"}[language]
    if detect_language(cleaned) != language or other in map(detect_language, (cleaned[:middle], cleaned[middle:])):
        return cleaned, "language"
    # What is left must stand alone: nothing that goes on from the sentence cut off.
    if has_chatter(cleaned) or (stripped and re.match(r"[a-z,;:)]", cleaned)):
        return cleaned, "chatter"
    return cleaned, ""


# ---------------------------------------------------------------------------------------------------------------------
# Selection over a whole file: pure functions of their arguments, so that a resumed run decides the same


def length_bias(words: list[int], keys: list[str], seed: int) -> set[int]:
    """Return the indices to drop so that the longer answers are learnt from (method section 2, rows 1b and 2b).

    With r the rank from the longest (near 0) to the shortest (near 1), an answer goes with probability min(1, 2 r^3):
    the shortest 20.6 % always, 40.5 % on average. r is the middle of the places that answers of equal length share,
    over their number: so equal lengths are treated alike, and few answers are thinned by the same share as many.

    Args:
        words: strict word counts, comparable between languages as characters are not.
        keys: the records' ids; the draw depends on (seed, key) only, not on order.
    """
    assert len(words) == len(keys), (len(words), len(keys))
    counts = Counter(words)
    rank, longer = {}, 0
    for length in sorted(counts, reverse=True):
        rank[length] = (longer + counts[length] / 2) / len(words)
        longer += counts[length]
    answers = enumerate(zip(words, keys, strict=True))
    return {i for i, (length, key) in answers if _uniform(seed, key) < 2 * rank[length] ** 3}


def _uniform(seed: int, key: str) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64


_PRIME = (1 << 61) - 1
NUM_BANDS, BAND_ROWS = 48, 4  # a pair of Jaccard 0.6 shares no band with probability (1 - 0.6^4)^48 = 0.13 %


class NearDuplicates:
    """Texts seen so far; `add` tells whether the next one is new.

    A near-duplicate has the same words as an earlier text, or at least 0.6 Jaccard similarity of 5-shingles (of words,
    in Chinese of characters). MinHash bands find the candidates in time linear in the number of texts, and an exact
    comparison decides. Refused texts are not remembered.
    """

    def __init__(self, threshold: float = 0.6, shingle: int = 5) -> None:
        self.threshold, self.shingle = threshold, shingle
        self.seen: list[set[int]] = []
        self.buckets: dict[tuple, list[int]] = {}
        rng = random.Random(0)
        self.hashes = [(rng.randrange(1, _PRIME), rng.randrange(_PRIME)) for _ in range(NUM_BANDS * BAND_ROWS)]

    def add(self, text: str, language: str) -> bool:
        """Remember the text and return True, or return False when it is a near-duplicate of a remembered one."""
        words = tokens(unicodedata.normalize("NFKC", text))
        num_shingles = max(len(words) - self.shingle + 1, 1)
        shingles = {_hash(words[i : i + self.shingle]) for i in range(num_shingles)}
        signature = [min((a * value + b) % _PRIME for value in shingles) for a, b in self.hashes]
        bands = [(i, *signature[i : i + BAND_ROWS]) for i in range(0, len(signature), BAND_ROWS)]
        candidates = {index for band in bands for index in self.buckets.get(band, ())}
        if any(self._similar(shingles, self.seen[index]) for index in candidates):
            return False
        for band in bands:
            self.buckets.setdefault(band, []).append(len(self.seen))
        self.seen.append(shingles)
        return True

    def _similar(self, a: set[int], b: set[int]) -> bool:
        common = len(a & b)
        return common >= self.threshold * (len(a) + len(b) - common)


def _hash(words: list[str]) -> int:
    """Stable between processes, unlike hash()."""
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=7).digest(), "big")
